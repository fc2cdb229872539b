"""Memory of the exported model and of PyTorch, each in a fresh process, beside what was predicted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mixt_export
from mixt_export.verification.graph import ExportedGraph
from mixt_export.verification.memory.predict import MemoryPrediction, predict_memory
from mixt_export.verification.memory.weights import checkpoint_size

_TIMEOUT = 900
PROMPT, DECODE = 64, 4
_WIDENED = (
    "ONNX Runtime's CPU kernels compute in float32 and keep a widened copy of float16 weights: measured here is more "
    "than predicted, which holds for a device with float16 kernels."
)

_ROUNDED = (
    "The graph ran in float32 with every 16-bit value rounded as typed, which ONNX Runtime's CPU does not do. "
    "Memory was therefore predicted, not measured. Nothing ran in TensorRT or on a GPU."
)


@dataclass(frozen=True)
class Measured:
    """Bytes of one fresh process. ``loaded`` and ``ran`` are growth over the imports; ``peak`` is the process's own.

    Growth counts anonymous memory and mapped files; ``anon`` is the part that the system cannot drop.
    """

    loaded: int
    ran: int
    anon: int
    peak: int


@dataclass(frozen=True)
class MemoryReport:
    """Predicted and measured bytes. ``dense_weights``: the same model with every factorised linear dense."""

    prefill: MemoryPrediction
    decode: MemoryPrediction
    max_seq_len: int
    kv_at_max: int
    dense_weights: int
    measured: dict[str, Measured] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def memory_report(
    graph: ExportedGraph, reference: Path, max_length: int, *, threads: int, measured: bool
) -> MemoryReport:
    """Predict for a prefill of PROMPT tokens and for one step at ``max_length``; measure if asked."""
    prompt = max(min(PROMPT, max_length - DECODE), 1)
    prefill = predict_memory(graph.proto, batch=1, seq=prompt, total=prompt)
    decode = predict_memory(graph.proto, batch=1, seq=1, total=max_length)
    itemsize = 4 if graph.dtype == "float32" else 2
    size = checkpoint_size(reference, graph.layers)
    report = MemoryReport(prefill, decode, max_length, decode.kv_cache, size.dense_elements * itemsize)
    if graph.rounds:
        report.notes.append(_ROUNDED)
    elif measured:
        if graph.dtype == "float16":
            report.notes.append(_WIDENED)
        common = {"dtype": "float32", "prompt": prompt, "decode": DECODE, "threads": threads, "layers": graph.layers}
        for kind, folder in (("exported", graph.folder), ("torch", reference)):
            found = run_probe({"kind": kind, "folder": str(folder.resolve()), **common})
            if isinstance(found, str):
                report.notes.append(f"memory of {kind} was not measured: {found}")
            else:
                report.measured[kind] = found
    return report


def run_probe(arguments: dict[str, Any]) -> Measured | str:
    """Measure in a fresh process; a string says why that was not possible."""
    package = str(Path(mixt_export.__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-m", "mixt_export.verification.memory.probe", json.dumps(arguments)]
    try:
        done = subprocess.run(  # noqa: S603 (our own interpreter and module)
            command, capture_output=True, timeout=_TIMEOUT, env={**os.environ, "PYTHONPATH": path}, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}"
    if done.returncode != 0:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
        return lines[-1][:300] if lines else f"the process ended with code {done.returncode}"
    found = json.loads(done.stdout.decode("utf-8").strip().splitlines()[-1])
    if not found["ran"]:
        return "this system does not report the memory of a process in /proc"
    before, loaded, ran = found["before"], found["loaded"], found["ran"]
    return Measured(
        loaded=loaded["rss"] - before["rss"],
        ran=ran["rss"] - before["rss"],
        anon=ran["anon"] - before["anon"],
        peak=ran["peak"],
    )
