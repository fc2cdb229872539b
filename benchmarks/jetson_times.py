"""Modelled time of one block on a Jetson, per method, as operators and as one kernel a linear: nothing runs.

python -m benchmarks.jetson_times [--device agx-orin-64gb] [--presets smollm2-135m llama3.2-1b llama2-7b]

Every linear of a block is replaced by cores of the method's usual sizes; the formulas are those of `mixt inspect MODEL
--device` (mixt_export/plan/gpu.py, fusion.py). Writes benchmarks/results/jetson_times.json and prints the table of
docs/tensorrt.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from math import prod

from benchmarks.common import RESULTS
from mixt_export.accounting import open_source
from mixt_export.families.wiring import Decoder, Linear
from mixt_export.network import FactorizedLinear, build
from mixt_export.targets.devices import device_named
from mixt_export.targets.times import WAYS, times_report

PRESETS = ("smollm2-135m", "llama3.2-1b", "llama2-7b")

#: Share of the parameters of a linear that low rank keeps, and rank of the tensor trains.
KEEP, RANKS = 0.5, {2: 16, 3: 16}
TERMS = 4
Make = Callable[[Decoder, Linear], FactorizedLinear | None]


def modes(size: int, sites: int) -> tuple[int, ...]:
    """``size`` as a product of ``sites`` factors, as even as its divisors allow, ascending."""
    if sites == 1:
        return (size,)
    root = size ** (1 / sites)
    first = max(divisor for divisor in range(1, int(root + 1e-9) + 1) if size % divisor == 0)
    return tuple(sorted((first, *modes(size // first, sites - 1))))


def low_rank(_decoder: Decoder, linear: Linear) -> FactorizedLinear:
    """Half the parameters."""
    i, o = linear.in_features, linear.out_features
    return build.low_rank(linear.name, i, o, int(KEEP * i * o / (i + o)))


def tensor_train(sites: int) -> Make:
    """Cores of ``sites`` sites with one rank."""

    def make(_decoder: Decoder, linear: Linear) -> FactorizedLinear:
        inside, outside = modes(linear.in_features, sites), modes(linear.out_features, sites)
        return build.tensor_train(linear.name, inside, outside, (RANKS[sites],) * (sites - 1))

    return make


def tucker(decoder: Decoder, linear: Linear) -> FactorizedLinear | None:
    """Query and output projection with shared factors; half of the features, three quarters of a head, four slices."""
    stem, _, last = linear.name.rpartition(".")
    width = decoder.heads * decoder.head_dim
    if last not in ("q_proj", "o_proj") or width != decoder.hidden_size:
        return None
    ranks = (decoder.hidden_size // 2, 3 * decoder.head_dim // 4, 4)
    return build.tucker_heads(
        linear.name, last[0], decoder.hidden_size, decoder.heads, decoder.head_dim, ranks, shared=f"{stem}.tucker"
    )


def mixt(_decoder: Decoder, linear: Linear) -> FactorizedLinear:
    """Four terms of bond 2; where features do not divide, padded as published."""
    i, o = linear.in_features, linear.out_features
    exact = i % 2 ** (TERMS - 1) == 0 and o % 2 ** (TERMS - 1) == 0
    return build.mixt(linear.name, i, o, TERMS, paper_padding=not exact)


METHODS: dict[str, Make] = {
    "dense": lambda *_: None,
    f"low rank, {KEEP:.0%} kept": low_rank,
    f"tensor train, 2 cores, rank {RANKS[2]}": tensor_train(2),
    f"tensor train, 3 cores, rank {RANKS[3]}": tensor_train(3),
    "Tucker heads (q and o)": tucker,
    f"MixT, {TERMS} terms": mixt,
}


def main() -> None:
    """Write the results and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="agx-orin-64gb")
    parser.add_argument("--presets", nargs="+", default=list(PRESETS))
    options = parser.parse_args()
    device = device_named(options.device)
    found = []
    print("| model | method | weights of a block, MB | decode | planned | fused | prefill | planned | fused |")
    print("|---|---|---|---|---|---|---|---|---|")
    for preset in options.presets:
        decoder = open_source(preset).decoder
        for method, make in METHODS.items():
            made = {linear.name: make(decoder, linear) for linear in decoder.blocks[0].linears}
            factors = {name: network for name, network in made.items() if network is not None}
            numbers = {
                tensor.name: prod(tensor.shape) for network in factors.values() for tensor in network.core_tensors()
            }
            dense = sum(x.in_features * x.out_features for x in decoder.blocks[0].linears if x.name not in factors)
            report = times_report(preset, decoder, factors, device)
            block = {group["step"]: group for group in report["groups"] if 0 in group["blocks"]}
            nbytes = 2 * (dense + sum(numbers.values()))
            found.append(
                {"preset": preset, "method": method, "block_bytes": nbytes, "steps": report["steps"]}
                | {step: group["linears"] | {"attention": group["attention"], "glue": group["glue"]}
                   for step, group in block.items()}
            )  # fmt: skip
            cells = [f"{1e6 * block[step]['whole'][way]:.0f}" for step in block for way in WAYS[1:]]
            print(f"| {preset} | {method} | {nbytes / 1e6:.2f} | {' | '.join(cells)} |", flush=True)
    facts = {"claim": "a model of published figures, not measured", "device": device.name, "model": report["model"]}
    text = json.dumps({**facts, "blocks": found}, indent=1)
    (RESULTS / "jetson_times.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
