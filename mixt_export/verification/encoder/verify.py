"""Prove an exported encoder against PyTorch float32."""

from __future__ import annotations

import time
from pathlib import Path

from mixt_export.errors import UnsupportedError
from mixt_export.progress import SILENT, Progress
from mixt_export.verification.assembling import assemble
from mixt_export.verification.encoder.checks import run_all
from mixt_export.verification.encoder.context import EncoderContext
from mixt_export.verification.memory.predict import predict_memory
from mixt_export.verification.options import VerifyOptions
from mixt_export.verification.report import Report


def verify_encoder(
    exported: Path, reference: Path, *, options: VerifyOptions | None = None, progress: Progress = SILENT
) -> Report:
    """Compare an exported encoder with PyTorch float32 on the model folder it was made from; see verifier.verify."""
    options = options or VerifyOptions()
    began = time.monotonic()
    context = EncoderContext(Path(exported), Path(reference), options, progress)
    results = run_all(context)
    if not all(result.passed for result in results) and context.judge_by_rounding():
        results = run_all(context)
    gate = context.gate
    context.release()
    return assemble(context, gate, results, "layer.{}", began, notes=_memory_notes(context))


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
