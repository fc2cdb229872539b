"""Compiled kernels on a GPU: right against float64, and timed beside standard operators and the dense matrix.

python -m benchmarks.kernels_on_gpu [--compiled FILE] [--rounds 30]
python -m benchmarks.kernels_on_gpu --compile FILE      on any machine: what a GPU machine without Triton launches

Needs a CUDA GPU of compute capability 8.0 or later and a PyTorch that sees it. ``chain`` is what TensorRT executes
without the plugin: the function's products and transposes, by PyTorch's libraries; ``dense`` the product with the
undecomposed matrix. Each variant is one CUDA graph of 32 calls over 8 sets of activations, replayed in random order;
microseconds of a call are the median over rounds. A GPU of a data centre is no Jetson: its times say which variant its
own units favour, not what a board does.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import machine, publish
from mixt_export.building.kernels import Compiled, compile_kernels
from tests.kernels.launcher import Driver
from tests.kernels.linears import Case, mixture, tactics, train

TOKENS = (1, 8, 32, 128, 1024)
CALLS, SETS = 32, 8
TOLERANCE = 1e-3

#: Linears in the sizes of SmolLM2 and of models with 4096 features.
LINEARS: dict[str, Callable[[int], Case]] = {
    "TT 576 to 1536, rank 16": lambda t: train("a", (24, 24), (32, 48), (16,), "float16", t),
    "TT 576 to 1536, rank 32": lambda t: train("b", (24, 24), (32, 48), (32,), "float16", t),
    "TT 4096 to 4096, rank 16": lambda t: train("c", (64, 64), (64, 64), (16,), "float16", t),
    "TT 4096 to 4096, rank 32": lambda t: train("d", (64, 64), (64, 64), (32,), "float16", t),
    "MixT 576 to 576, 2 windows": lambda t: mixture("h", (288, 288), 2, (1, 1), None, True, "float16", t),
    "MixT 4096 to 4096, 2 windows": lambda t: mixture("i", (2048, 2048), 2, (1, 1), None, True, "float16", t),
    "MixT 4096 to 4096, 2 windows of 2": lambda t: mixture("j", (512, 512), 2, (2, 2), None, True, "float16", t),
    "MixT 4096 to 4096, 4 windows": lambda t: mixture("k", (512, 512), 2, (1, 1, 1, 1), None, True, "float16", t),
}


@dataclass(frozen=True)
class Variant:
    """``call(k)`` computes y of the activation set ``k`` and returns it."""

    name: str
    call: Callable[[int], Any]


def chain_of(case: Case, tensors: list[Any]) -> Callable[[Any], Any]:
    """x -> y by matrix products, as the function's body computes it; ``tensors`` are the matrices on the device."""
    import torch

    linear = case.linear
    if isinstance(linear, tactics.Mixture):

        def windows(x: Any) -> Any:
            y = None
            for window, weight in zip(linear.windows, tensors, strict=True):
                turned = weight.T if linear.transposed else weight
                split = x.reshape(-1, window.left, window.columns, window.right).transpose(2, 3)
                product = split.reshape(-1, window.columns) @ turned
                apart = product.reshape(-1, window.left, window.right, window.rows).transpose(2, 3)
                part = apart.reshape(len(x), -1)
                y = part if y is None else y + part
            return y

        return windows
    ranks = (1, *linear.ranks, 1)
    matrices = [
        core.reshape(ranks[site] * linear.out_modes[site], linear.in_modes[site] * ranks[site + 1])
        for site, core in enumerate(tensors)
    ]

    def train_chain(x: Any) -> Any:
        last = len(matrices) - 1
        s = x.reshape(-1, linear.in_modes[last]) @ matrices[last].T
        for site in range(last - 1, -1, -1):
            columns = prod(linear.out_modes[site + 1 :])
            s = torch.matmul(matrices[site], s.reshape(-1, linear.in_modes[site] * ranks[site + 1], columns))
        return s.reshape(len(x), -1)

    return train_chain


def variants_of(case: Case, kernels: dict[str, Compiled], driver: Driver) -> list[Variant]:
    """Every way to compute ``case``; the first set of activations is its own."""
    import torch

    rng = np.random.default_rng(0)
    inputs = [case.x, *(rng.permuted(case.x, axis=0) for _ in range(SETS - 1))]
    sets = [torch.from_numpy(np.ascontiguousarray(x)).cuda() for x in inputs]
    matrices = [torch.from_numpy(matrix).cuda() for matrix in case.matrices]
    dense = torch.from_numpy(case.dense).to(sets[0].dtype).cuda()
    chain = chain_of(case, matrices)
    found = [Variant("dense", lambda k: sets[k] @ dense), Variant("chain", lambda k: chain(sets[k]))]
    kernel = case.linear.candidate()
    found.append(Variant("kernel", _launcher(case, kernel, kernels[kernel.name], driver, sets, matrices)))
    return found


def _launcher(
    case: Case, kernel: Any, file: Compiled, driver: Driver, sets: list[Any], matrices: list[Any]
) -> Callable[[int], Any]:
    import torch

    how = case.linear.launch(kernel)
    function = driver.load(file.ptx, file.entry)
    grid = how.grid(len(case.x))
    shape = (len(case.x), case.dense.shape[1])
    outputs = [torch.full(shape, torch.nan, dtype=sets[0].dtype, device="cuda") for _ in sets]

    def launch(k: int) -> Any:
        pointers = [tensor.data_ptr() for tensor in (sets[k], *matrices)]
        stream = torch.cuda.current_stream().cuda_stream
        numbers = [len(case.x), *how.numbers]
        driver.launch(function, grid, file.threads, file.shared, pointers, numbers, outputs[k].data_ptr(), stream)
        return outputs[k]

    return launch


def timed(variants: list[Variant], rounds: int) -> dict[str, float]:
    """Microseconds of a call of each variant."""
    import torch

    graphs = {}
    for variant in variants:
        variant.call(0)
        torch.cuda.synchronize()
        graphs[variant.name] = graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in range(CALLS):
                variant.call(call % SETS)
    rng = np.random.default_rng(1)
    spent: dict[str, list[float]] = {name: [] for name in graphs}
    names = list(graphs)
    for number in range(rounds + 2):
        for index in rng.permutation(len(names)):
            began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            began.record()
            graphs[names[index]].replay()
            ended.record()
            torch.cuda.synchronize()
            if number > 1:
                spent[names[index]].append(1e3 * began.elapsed_time(ended) / CALLS)
    return {name: round(statistics.median(values), 2) for name, values in spent.items()}


def row(name: str, tokens: int, kernels: dict[str, Compiled], driver: Driver, rounds: int) -> dict[str, Any]:
    case = LINEARS[name](tokens)
    expected = case.expected()
    variants = variants_of(case, kernels, driver)
    errors = {}
    for variant in variants:
        found = variant.call(0).cpu().numpy().astype(np.float64)
        errors[variant.name] = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
    # written so that a NaN fails too
    wrong = [name for name, error in errors.items() if not error < TOLERANCE]
    return {
        "linear": name,
        "tokens": tokens,
        "rel_l2": {name: float(f"{error:.2e}") for name, error in errors.items()},
        "wrong": wrong,
        "microseconds": timed(variants, rounds),
    }


def needed() -> list[Any]:
    """Every kernel that serves one of the linears, once."""
    kernels = {kernel.name: kernel for kernel in (make(1).linear.candidate() for make in LINEARS.values())}
    return list(kernels.values())


def compiled(file: Path | None) -> dict[str, Compiled]:
    """Kernels by name, from ``file`` or by the Triton that is here."""
    if file is None:
        found = list(compile_kernels(needed()))
    else:
        texts = json.loads(file.read_text(encoding="utf-8"))
        found = [Compiled(kernel, **texts[kernel.name]) for kernel in needed()]
    failed = [kernel.reason for kernel in found if not isinstance(kernel, Compiled)]
    if failed:
        raise SystemExit(f"a kernel did not compile: {failed[0]}")
    return {kernel.kernel.name: kernel for kernel in found if isinstance(kernel, Compiled)}


def gpu() -> dict[str, Any]:
    """The GPU's name, its compute capability and the libraries that drive it."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    return {"gpu": torch.cuda.get_device_name(), "sm": 10 * major + minor, "torch": torch.__version__}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compile", type=Path, metavar="FILE", help="write compiled kernels to FILE and end")
    parser.add_argument("--compiled", type=Path, metavar="FILE", help="launch the kernels of FILE")
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    if options.compile:
        texts = {
            name: {"ptx": file.ptx, "entry": file.entry, "shared": file.shared, "threads": file.threads}
            for name, file in compiled(None).items()
        }
        options.compile.write_text(json.dumps(texts), encoding="utf-8")
        print(f"{len(texts)} kernels in {options.compile}")
        return
    kernels, driver = compiled(options.compiled), Driver()
    rows = [row(name, tokens, kernels, driver, options.rounds) for name in LINEARS for tokens in TOKENS]
    wrong = [f"{found['linear']}, {found['tokens']} tokens" for found in rows if found["wrong"]]
    publish("kernels_on_gpu", {"device": gpu(), "wrong": wrong, "rows": rows})
    print("FAILED" if wrong else "PASSED", machine()["versions"])


if __name__ == "__main__":
    main()
