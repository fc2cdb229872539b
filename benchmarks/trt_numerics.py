"""Numerics of the very graph that TensorRT gets: fp16 exports of SmolLM2-135M in ONNX Runtime against PyTorch float32.

python -m benchmarks.trt_numerics [dense] [low_rank=FOLDER] [mixt=FOLDER] [--positions 640] [--jetpack 6 7]

Shipped texts in windows of 128 tokens and eight prompts. Each graph runs with a rounding after every value that is
typed 16 bits, as a strongly typed engine rounds (``rounded``), and as ONNX Runtime computes by itself (``plain``).
Beside them what float16 costs PyTorch. ``passed``: relative L2 at most twice PyTorch's, KL at most 1e-3, the same top
token at 99 % of all positions, ties counted as misses. What kernels of a device do is not part of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import RESULTS, sample
from mixt_export.targets import export
from mixt_export.targets.trt import TrtOptions
from mixt_export.verification.graph import open_graph
from mixt_export.verification.metrics import LogitsComparison
from mixt_export.verification.options import VerifyOptions
from mixt_export.verification.session import ExportedRunner, Ids
from mixt_export.verification.tokens import make_sequences, open_tokenizer
from mixt_export.verification.torch_model import TorchModel

MAX_SEQ_LEN = 256
MOST_KL, LEAST_TOP1, TIMES_TORCH = 1e-3, 0.99, 2.0
Logits = NDArray[np.float32]


def compared(run: Callable[[Ids], Logits], sequences: Sequence[Ids], expected: Sequence[Logits]) -> dict[str, Any]:
    """Errors of ``run`` over all positions of ``sequences``; every other top token is a miss."""
    found = LogitsComparison(tolerance=0.0)
    for tokens, reference in zip(sequences, expected, strict=True):
        found.add(run(tokens), reference)
    same = 1 - (found.flips + found.ties) / found.positions
    return {"positions": found.positions, "rel_l2": found.rel_l2, "kl": found.kl, "top1": same}


def graph_runs(out: Path, rounds: bool) -> Callable[[Ids], Logits]:
    """Logits (seq, vocab) of the exported graph at all positions; ``rounds``: every 16-bit value is rounded."""
    graph = open_graph(out)
    if graph.rounds != rounds:
        graph = dataclasses.replace(graph, dialect="portable")
    runner = ExportedRunner(graph, 1, all_positions=True, layers=False)
    return lambda tokens: np.asarray(runner.full(tokens).logits[0], np.float32)


def case(label: str, model: Path, jetpacks: Sequence[int], positions: int) -> list[dict[str, Any]]:
    """Every dialect of one model."""
    reference = TorchModel(model, threads=1)
    options = VerifyOptions(positions=positions)
    made = make_sequences(open_tokenizer(model), reference.vocab_size, MAX_SEQ_LEN, options)
    sequences = [*made.windows, *made.prompts]
    expected = [reference.logits(tokens) for tokens in sequences]
    del reference
    half = TorchModel(model, dtype="float16", threads=1)
    torch_cost = compared(half.logits, sequences, expected)
    del half
    print(f"{label:9} PyTorch float16  {_line(torch_cost)}", flush=True)
    rows = []
    for jetpack in jetpacks:
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "out"
            trt = TrtOptions(jetpack=jetpack, max_input_len=128)
            result = export(model, out, target="trt", dtype="fp16", max_seq_len=MAX_SEQ_LEN, trt=trt, verify=False)
            row: dict[str, Any] = {"model": label, "dialect": result.plan.target.dialect.name, "pytorch": torch_cost}
            for name, rounds in (("rounded", True), ("plain", False)):
                row[name] = compared(graph_runs(out, rounds), sequences, expected)
                row[name]["passed"] = _passes(row[name], torch_cost)
                print(f"{label:9} {row['dialect']} {name:8} {_line(row[name])}", flush=True)
            rows.append(row)
    return rows


def _passes(found: dict[str, Any], torch_cost: dict[str, Any]) -> bool:
    near = found["rel_l2"] <= TIMES_TORCH * torch_cost["rel_l2"]
    return bool(near and found["kl"] <= MOST_KL and found["top1"] >= LEAST_TOP1)


def _line(found: dict[str, Any]) -> str:
    verdict = "" if "passed" not in found else " · passed" if found["passed"] else " · FAILED"
    return (
        f"relative L2 {found['rel_l2']:.2e} · KL {found['kl']:.1e} · top token {100 * found['top1']:.2f} % of "
        f"{found['positions']}{verdict}"
    )


def main() -> None:
    """Run every model asked for and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["dense"], help="dense, or LABEL=FOLDER")
    parser.add_argument("--positions", type=int, default=640)
    parser.add_argument("--jetpack", type=int, nargs="+", default=[6, 7])
    options = parser.parse_args()
    began, rows = time.process_time(), []
    for name in options.models:
        label, _, folder = name.partition("=")
        rows += case(label, Path(folder) if folder else sample(), options.jetpack, options.positions)
    passed = all(row[name]["passed"] for row in rows for name in ("rounded", "plain"))
    print(f"{'all passed' if passed else 'NOT all passed'}, {time.process_time() - began:.0f} CPU s")
    limits = {"kl": MOST_KL, "top1": LEAST_TOP1, "times_pytorch": TIMES_TORCH, "passed": passed}
    text = json.dumps({"limits": limits, "cases": rows}, indent=1)
    (RESULTS / "trt_numerics.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
