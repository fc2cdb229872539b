"""How close real weights are to MixT: natural order, reordered hidden channels, rotated residual stream, low rank.

python -m benchmarks.mixt_structure [--blocks 15 29] [--n-tensors 2 3 4] [--windows 32] [--seed 0]

For every linear the root of the mean over tokens of ||W x - W' x||² / ||W x||² of the least squares MixT, on
calibration, held-out (addresses, jargon) and out-of-domain (novel) tokens. See docs/mixt-structure.md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.common import publish, sample

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
#: Linears that write to the residual stream; the others but o and down read it through the norm named here.
WRITERS = ("self_attn.o_proj", "mlp.down_proj")
NORMS = {"self_attn": "input_layernorm", "mlp": "post_attention_layernorm"}
WINDOW = 256


class Statistics:
    """Dense weights of the chosen blocks and the token-weighted Grams of their inputs, one set per kind of text."""

    def __init__(self, blocks: Sequence[int], windows: int) -> None:
        from mixt_export.compression.permutation import GATED_MLP
        from mixt_export.compression.texts import calibration_windows
        from mixt_export.reference import load_reference
        from mixt_export.sample.texts import CALIBRATION, EVALUATION, IN_DOMAIN, OUT_OF_DOMAIN

        model: Any = load_reference(sample(), attn="sdpa")
        texts = {
            "calibration": (list(CALIBRATION.values()), windows),
            "held out": ([EVALUATION[name] for name in IN_DOMAIN], max(2, windows // 3)),
            "out of domain": ([EVALUATION[name] for name in OUT_OF_DOMAIN], max(1, windows // 4)),
        }
        self.names = (*ATTENTION, *GATED_MLP)
        self.layers = {block: model.model.layers[block] for block in blocks}
        self.grams: dict[tuple[int, str, str], Any] = {}
        for kind, (paths, count) in texts.items():
            tokens, _ = calibration_windows(sample(), paths, count, WINDOW, model.config.vocab_size)
            self._gather(model, kind, tokens)

    def _gather(self, model: Any, kind: str, tokens: Any) -> None:
        import torch

        from mixt_export.compression.statistics import Gram
        from mixt_export.compression.tensor_mixture.moments import token_weights

        sums, handles = {}, []
        for block, layer in self.layers.items():
            for name in self.names:
                linear = layer.get_submodule(name)
                gram = sums[block, name] = Gram(linear.in_features)

                def hear(module: Any, inputs: Any, gram: Any = gram) -> None:
                    x = inputs[0].reshape(-1, module.in_features)
                    gram.add(x * token_weights(x @ module.weight.T).sqrt()[:, None])

                handles.append(linear.register_forward_pre_hook(hear))
        with torch.no_grad():
            for row in tokens:
                model.model(torch.from_numpy(row)[None], use_cache=False)
        for handle in handles:
            handle.remove()
        self.grams |= {(block, name, kind): gram.mean() for (block, name), gram in sums.items()}


def fitted(weight: Any, grams: dict[str, Any], terms: int) -> dict[str, float]:
    from mixt_export.compression.tensor_mixture.closed_form import fit, match
    from mixt_export.reference.tensor_mixture import MixTShape, densify

    shape = MixTShape(weight.shape[1], weight.shape[0], terms)
    gram = grams["calibration"]
    cores = fit(weight @ gram, gram, shape, ridge=1e-3, sweeps=8, start=match(weight, shape))
    return errors(weight, densify(cores, shape), grams)


def errors(weight: Any, made: Any, grams: dict[str, Any]) -> dict[str, float]:
    found = {}
    for kind, gram in grams.items():
        lost, whole = (float(((matrix @ gram) * matrix).sum()) for matrix in (weight - made, weight))
        found[kind] = round((lost / whole) ** 0.5, 4)
    return found


def low_rank(weight: Any, grams: dict[str, Any], terms: int) -> dict[str, float]:
    from mixt_export.compression.closed_form import damped, decompose

    rank = terms * weight.numel() // 4 ** (terms - 1) // sum(weight.shape)
    found = decompose(weight, damped(grams["calibration"], 1e-4), None, rank)
    return errors(weight, found.up[:, :rank] @ found.down[:rank], grams)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, nargs="+", default=[15, 29])
    parser.add_argument("--n-tensors", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--windows", type=int, default=32, help="of 256 calibration tokens")
    parser.add_argument("--seed", type=int, default=0, help="of the random rotation")
    given = parser.parse_args()
    import torch

    from mixt_export.compression.permutation import GATED_MLP, ffn_permutation
    from mixt_export.reference.tensor_mixture import MixTShape

    torch.set_num_threads(1)
    statistics = Statistics(given.blocks, given.windows)
    rows: list[dict[str, Any]] = []
    for block, layer in statistics.layers.items():
        weights = {name: layer.get_submodule(name).weight.detach().double() for name in statistics.names}
        kinds = dict.fromkeys(kind for _, _, kind in statistics.grams)
        grams = {name: {kind: statistics.grams[block, name, kind] for kind in kinds} for name in statistics.names}
        width = weights[ATTENTION[0]].shape[1]
        noise = torch.randn(width, width, dtype=torch.float64, generator=torch.Generator().manual_seed(given.seed))
        basis = torch.linalg.qr(noise)[0]
        for terms in given.n_tensors:
            began = time.process_time()
            gate, up, down = GATED_MLP
            order = ffn_permutation(
                (weights[gate], weights[up]),
                (grams[gate]["calibration"], grams[up]["calibration"]),
                MixTShape(width, len(weights[gate]), terms),
            )
            spent = round(time.process_time() - began, 1)
            for name, weight in weights.items():
                own = grams[name]
                row: dict[str, Any] = {"block": block, "linear": name, "n_tensors": terms}
                row["natural"] = fitted(weight, own, terms)
                if name in (gate, up):
                    row["permuted"] = fitted(weight[order], own, terms)
                elif name == down:
                    moved = {kind: gram[order][:, order] for kind, gram in own.items()}
                    row["permuted"] = fitted(weight[:, order], moved, terms)
                if name in WRITERS:
                    row["rotated"] = fitted(basis.T @ weight, own, terms)
                else:
                    norm = getattr(layer, NORMS[name.partition(".")[0]]).weight.detach().double()
                    turned = {k: basis.T @ (gram / norm[:, None] / norm) @ basis for k, gram in own.items()}
                    row["rotated"] = fitted((weight * norm) @ basis, turned, terms)
                row["low rank of equal size"] = low_rank(weight, own, terms)
                rows.append(row)
            rows.append({"block": block, "n_tensors": terms, "CPU seconds of the permutation": spent})
    publish("mixt_structure", {"calibration windows of 256": given.windows, "rows": rows})


if __name__ == "__main__":
    main()
