"""What gauge balancing changes: largest intermediates, float16 error and int8 error, and a model that overflows.

python -m benchmarks.balance low_rank=FOLDER tt=FOLDER tucker=FOLDER mixt=FOLDER [--positions 64] [--overflow FOLDER]

Folders come from `mixt compress`. Per model and way of balancing (none, weights, calibrated: maxima of 2 windows of 128
shipped tokens):

- ``largest``: largest |value| between the cores of a linear over calibration tokens; of several branches or one with
  a scale also their outputs before it, and their sum; ``spread``: log2 between the largest and the smallest channel of
  an intermediate, mean over intermediates; ``reach``: log2 between the largest and the smallest slice of a core along
  its bonds, mean over cores.
- ``float16``: relative L2 of logits against PyTorch float32, of the exported `trt10` graph with a rounding after every
  value that is typed 16 bits (as benchmarks.trt_numerics does); beside it the dense model's.
- ``int8``: relative error of the linears' outputs for calibration inputs with cores rounded to 8 bits, symmetric, one
  scale per tensor, or one per 32 entries that are summed over; root mean square over linears.

``--overflow``: bonds of that low rank model are scaled by 2^12 up and down, then it is exported at float16 and verified
without and with balancing.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import RESULTS, sample
from benchmarks.trt_numerics import compared, graph_runs
from mixt_export import network
from mixt_export.checkpoints import Checkpoint, Made, open_checkpoint, overlaid, write_checkpoint
from mixt_export.network import Branch, best_orders
from mixt_export.network.order import steps
from mixt_export.passes import balance
from mixt_export.passes.equalise import reach
from mixt_export.passes.gauge import freedoms
from mixt_export.passes.maxima import intermediate_maxima, states
from mixt_export.targets import export
from mixt_export.targets.rewriting import Rewriting
from mixt_export.targets.trt import TrtOptions
from mixt_export.verification.options import VerifyOptions
from mixt_export.verification.tokens import make_sequences, open_tokenizer
from mixt_export.verification.torch_model import TorchModel

MAX_SEQ_LEN, TOKENS, GROUP = 256, 64, 32
Array = NDArray[Any]


def float16_errors(model: Path, modes: Sequence[str], positions: int) -> dict[str, Any]:
    """Mode of balancing -> error of the exported float16 graph."""
    reference = TorchModel(model, threads=1)
    options = VerifyOptions(positions=positions)
    made = make_sequences(open_tokenizer(model), reference.vocab_size, MAX_SEQ_LEN, options)
    sequences = [*made.windows, *made.prompts]
    expected = [reference.logits(tokens) for tokens in sequences]
    del reference
    found = {}
    for mode in modes:
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "out"
            trt = TrtOptions(jetpack=6, max_input_len=128, scan=False)
            rewriting = Rewriting(balance=mode)
            export(
                model, out, target="trt", dtype="fp16", max_seq_len=MAX_SEQ_LEN, trt=trt, rewriting=rewriting,
                verify=False,
            )  # fmt: skip
            found[mode] = compared(graph_runs(out, True), sequences, expected)
    return found


def int8_error(checkpoint: Checkpoint, inputs: Mapping[str, Array], group: int | None) -> float:
    """Root mean square over linears of ||ŷ - y|| / ||y||; ``group`` None: one scale per tensor."""
    errors = []
    for name, linear in checkpoint.factors.items():
        values = {core.name: checkpoint.store.read(core.name, "float64") for core in linear.core_tensors()}
        rounded = dict(values)
        for branch, order in zip(linear.branches, best_orders(linear), strict=True):
            for (tensor, axes), core in zip(_summed(branch, order), (branch.cores[i] for i in order), strict=True):
                rounded[tensor] = _int8(values[core.tensor.name], axes, group)
        bare = replace(linear, bias=None, sparse=None)
        x = inputs[name].astype(np.float64)
        exact = network.apply(bare, values.__getitem__, x)
        errors.append(
            float(np.linalg.norm(network.apply(bare, rounded.__getitem__, x) - exact) / np.linalg.norm(exact))
        )
    return float(np.sqrt(np.mean(np.square(errors))))


def _summed(branch: Branch, order: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """Per step: the core, and its axes that the step sums over."""
    found = []
    for index, (_, after) in zip(order, steps(branch, order), strict=True):
        core = branch.cores[index]
        found.append((core.tensor.name, tuple(axis for axis, label in enumerate(core.labels) if label not in after)))
    return found


def _int8(values: Array, axes: tuple[int, ...], group: int | None) -> Array:
    """``values`` rounded to 8 bits: one scale, or one per ``group`` entries in a row along the summed ``axes``."""
    if group is None:
        scale = np.abs(values).max() / 127
        return np.asarray(np.rint(values / scale) * scale) if scale else values
    kept = [axis for axis in range(values.ndim) if axis not in axes]
    moved = values.transpose(*kept, *axes)
    flat = moved.reshape(int(np.prod(moved.shape[: len(kept)])), -1)
    pad = -flat.shape[1] % group
    blocks = np.pad(flat, ((0, 0), (0, pad))).reshape(len(flat), -1, group)
    scale = np.abs(blocks).max(axis=2, keepdims=True) / 127
    scale[scale == 0] = 1.0
    back = (np.rint(blocks / scale) * scale).reshape(len(flat), -1)[:, : flat.shape[1]].reshape(moved.shape)
    return np.asarray(back.transpose(np.argsort([*kept, *axes])))


def ranges(checkpoint: Checkpoint, inputs: Mapping[str, Array]) -> dict[str, float]:
    """``largest``, ``spread`` and ``reach``, see above."""
    largest = 0.0
    spreads: list[float] = []
    reaches: list[float] = []
    for name, linear in checkpoint.factors.items():
        cores = {core.name: checkpoint.store.read(core.name, "float32") for core in linear.core_tensors()}
        total: Array | None = None
        for branch, order in zip(linear.branches, best_orders(linear), strict=True):
            every = list(states(replace(linear, branches=(branch,)), cores, inputs[name]))
            alone = len(linear.branches) == 1 and branch.scale == 1.0
            for _, state in every[:-1] if alone else every:
                most = np.abs(state).max(axis=0)
                largest = max(largest, float(most.max()))
            for _, state in every[:-1]:
                most = np.abs(state).max(axis=0)
                spreads.append(float(np.log2(most.max() / most[most > 0].min())))
            last = _output(branch, order, every[-1][1])
            total = last if total is None or total.shape != last.shape else total + last
        if len(linear.branches) > 1 and total is not None:
            largest = max(largest, float(np.abs(total).max()))
        for freedom in freedoms([linear]):
            for tensor, axes in freedom.powers:
                slices = reach(cores[tensor], axes)
                slices = slices[np.isfinite(slices)]
                reaches.append(float(slices.max() - slices.min()) if slices.size else 0.0)
    return {"largest": largest, "spread": _mean(spreads), "reach": _mean(reaches)}


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 0.0


def _output(branch: Branch, order: tuple[int, ...], state: Array) -> Array:
    labels = steps(branch, order)[-1][1]
    axes = [labels.index(label) + 1 for label, _ in branch.out_modes]
    return state.transpose(0, *axes).reshape(len(state), branch.out_size)


def case(label: str, model: Path, positions: int) -> dict[str, Any]:
    """Everything about one model."""
    checkpoint = open_checkpoint(model)
    maxima, inputs = intermediate_maxima(checkpoint, windows=2, keep_inputs=TOKENS)
    made = {
        "none": checkpoint,
        "weights": balance(checkpoint),
        "calibrated": balance(checkpoint, maxima=maxima),
        "weights, any D": balance(checkpoint, whole=False),
    }
    row: dict[str, Any] = {"model": label, "linears": len(checkpoint.factors), "ways": {}}
    for way, balanced in made.items():
        row["ways"][way] = {
            **ranges(balanced, inputs),
            "int8_tensor": int8_error(balanced, inputs, None),
            "int8_group": int8_error(balanced, inputs, GROUP),
        }
        print(label, way, {key: f"{value:.4g}" for key, value in row["ways"][way].items()}, flush=True)
    row["float16"] = float16_errors(model, ("none", "weights"), positions)
    print(label, "float16", {key: f"{value['rel_l2']:.3e}" for key, value in row["float16"].items()}, flush=True)
    return row


def overflowing(model: Path, folder: Path, power: int) -> Path:
    """``model`` (low rank) with every bond scaled by 2^power before and 2^-power behind it, written to ``folder``."""
    source = open_checkpoint(model)
    tensors: dict[str, Made] = {}
    for linear in source.factors.values():
        for ref, sign in zip(linear.core_tensors(), (1, -1), strict=True):
            tensors[ref.name] = Made(ref.dtype, ref.shape, partial(_scaled, source, ref.name, sign * power))
    changed = overlaid(source, tensors)
    folder.mkdir()
    write_checkpoint(folder, changed, [], changed.factors, source.info)
    return folder


def _scaled(source: Checkpoint, name: str, power: int) -> Array:
    return np.asarray(np.ldexp(source.store.read(name), power))


def overflow_case(model: Path, power: int = 12) -> dict[str, Any]:
    """Verdicts of `mixt verify` on the float16 export of the overflowing model, without and with balancing."""
    found: dict[str, Any] = {"power": power}
    with tempfile.TemporaryDirectory() as scratch:
        broken = overflowing(model, Path(scratch) / "model", power)
        for mode in ("none", "auto"):
            result = export(
                broken, Path(scratch) / mode, target="trt", dtype="fp16", max_seq_len=MAX_SEQ_LEN,
                trt=TrtOptions(jetpack=6, max_input_len=128, scan=False), rewriting=Rewriting(balance=mode),
            )  # fmt: skip
            report = result.report
            worst = next((check for check in report.checks if not check.passed), report.checks[0])
            found[mode] = {"passed": report.passed, "says": worst.reason, "tolerance": report.minimum_tolerance}
            print("overflow", mode, found[mode], flush=True)
    return found


def main() -> None:
    """Run every model asked for and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="LABEL=FOLDER")
    parser.add_argument("--positions", type=int, default=64)
    parser.add_argument("--overflow", type=Path)
    options = parser.parse_args()
    began = time.process_time()
    results: dict[str, Any] = {"positions": options.positions}
    results["dense"] = float16_errors(sample(), ("none",), options.positions)
    print("dense", {key: f"{value['rel_l2']:.3e}" for key, value in results["dense"].items()}, flush=True)
    pairs = [name.partition("=") for name in options.models]
    results["cases"] = [case(label, Path(folder), options.positions) for label, _, folder in pairs]
    if options.overflow is not None:
        results["overflow"] = overflow_case(options.overflow)
    results["cpu_seconds"] = round(time.process_time() - began)
    (RESULTS / "balance.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
