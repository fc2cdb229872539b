"""Prove an exported encoder against PyTorch float32."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from mixt_export.errors import UnsupportedError
from mixt_export.progress import SILENT, Progress
from mixt_export.verification.encoder.checks import run_all
from mixt_export.verification.encoder.context import EncoderContext
from mixt_export.verification.memory.predict import predict_memory
from mixt_export.verification.options import VerifyOptions
from mixt_export.verification.report import LayerError, Report

_PACKAGES = ("onnxruntime", "onnx", "torch", "transformers", "numpy")


def verify_encoder(
    exported: Path, reference: Path, *, options: VerifyOptions | None = None, progress: Progress = SILENT
) -> Report:
    """Compare an exported encoder with PyTorch float32 on the model folder it was made from; see verifier.verify."""
    from mixt_export import __version__

    options = options or VerifyOptions()
    began = time.monotonic()
    context = EncoderContext(Path(exported), Path(reference), options, progress)
    results = run_all(context)
    if not all(result.passed for result in results) and context.judge_by_rounding():
        results = run_all(context)
    gate, errors = context.gate, context.layers.values()
    thresholds = gate.layers[: len(errors)]  # no errors where the runtime refused to run
    costs: Sequence[float | None] = gate.cost.layers[: len(errors)] if gate.cost else [None] * len(errors)
    context.release()
    needed = [result.metrics["needed_tolerance"] for result in results if "needed_tolerance" in result.metrics]
    numbers = [float(value) for value in needed if isinstance(value, int | float)]
    report = Report(
        tool_version=__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        exported=str(exported),
        reference=str(reference),
        dialect=context.graph.dialect,
        dtype=context.graph.dtype,
        tolerance=gate.tolerance,
        tolerance_origin=gate.origin,
        minimum_tolerance=max(numbers) if numbers and all(map(math.isfinite, numbers)) else None,
        checks=results,
        layers=[
            LayerError(f"layer.{index}", error, threshold, cost)
            for index, (error, threshold, cost) in enumerate(zip(errors, thresholds, costs, strict=True))
        ],
        dtype_cost=gate.cost,
        versions={name: importlib.metadata.version(name) for name in _PACKAGES},
        options={item.name: getattr(options, item.name) for item in dataclasses.fields(options)},
        notes=_memory_notes(context),
        seconds=time.monotonic() - began,
    )
    if options.write:
        report.write(Path(exported))
    return report


def _memory_notes(context: EncoderContext) -> list[str]:
    length = min(128, context.max_length)
    try:
        found = predict_memory(context.graph.proto, batch=1, seq=length, total=length)
    except UnsupportedError as error:
        return [f"memory was not predicted: {error}"]
    return [
        f"predicted for one sequence of {length} tokens: weights {found.weights / 1e6:.1f} MB, "
        f"activations {(found.activations + found.workspace) / 1e6:.1f} MB."
    ]
