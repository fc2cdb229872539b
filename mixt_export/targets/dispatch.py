"""Export any model folder: decoders one way, encoders another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mixt_export.checkpoints import open_checkpoint
from mixt_export.errors import UnsupportedError, UsageError
from mixt_export.families.encoders import is_encoder
from mixt_export.targets.encoder import EncoderPlan, export_encoder, plan_encoder
from mixt_export.targets.export import ExportPlan, ExportResult
from mixt_export.targets.export import export as export_decoder
from mixt_export.targets.export import plan_export as plan_decoder

_DECODERS_ONLY = ("trt", "variants", "quantisation", "int8_cache", "rewriting")


def export(model_dir: Path | str, output: Path | str, **options: Any) -> ExportResult:
    """Write ``model_dir`` as an ONNX folder at ``output``; see targets.export.export and targets.encoder."""
    if is_encoder(open_checkpoint(model_dir).config):
        return export_encoder(model_dir, output, **_for_encoder(options))
    return export_decoder(model_dir, output, **options)


def plan_export(model_dir: Path, **options: Any) -> ExportPlan | EncoderPlan:
    """Everything about an export that needs no weight."""
    if is_encoder(open_checkpoint(model_dir).config):
        return plan_encoder(model_dir, **_for_encoder(options))
    return plan_decoder(model_dir, **options)


def _for_encoder(options: dict[str, Any]) -> dict[str, Any]:
    """Without what only a decoder has. Raises UsageError or UnsupportedError where such an option was given."""
    trt = options.get("trt")
    if trt is not None and trt.given() and options.get("target") != "trt":
        raise UsageError(f"{trt.given()[0]} is an option of --target trt, which takes decoders; leave it out.")
    if options.get("variants", "auto") not in ("auto", "none"):
        raise UsageError("--variants: an encoder reads all its tokens at once; leave it out.")
    if options.get("quantisation") is not None:
        raise UnsupportedError("--quantize: encoders are exported with float weights only; leave it out.")
    if options.get("int8_cache") is not None:
        raise UnsupportedError("--kv-cache: an encoder keeps no keys and values; leave it out.")
    rewriting = options.get("rewriting")
    if rewriting is not None and rewriting.asked:
        raise UnsupportedError(f"{rewriting.asked}: knows decoders only, this model is an encoder; leave it out.")
    return {name: value for name, value in options.items() if name not in _DECODERS_ONLY}
