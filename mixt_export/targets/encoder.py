"""Export an encoder: the same steps as for a decoder, without cache, board or text generation."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mixt_export import __version__
from mixt_export.checkpoints import Checkpoint, check_finite, open_checkpoint
from mixt_export.checkpoints.strictjson import load_object
from mixt_export.errors import UnsupportedError, UsageError
from mixt_export.families.encoder_wiring import Encoder
from mixt_export.families.encoders import encoder_of
from mixt_export.lower import LoweredModel
from mixt_export.lower.encoder import encoder_factors, lower_encoder
from mixt_export.plan import CPU, Device, FormPlan
from mixt_export.plan.report import plan_entry
from mixt_export.progress import SILENT, Progress
from mixt_export.staging import check_output, require_space, staged_folder
from mixt_export.targets.export import ExportResult
from mixt_export.targets.files import write_json, write_model
from mixt_export.targets.manifest import FILE, SCHEMA, linear_entry, special_token_ids
from mixt_export.targets.planning import FormOptions, lower_planned
from mixt_export.targets.registry import Target, dtype_named, target_named

KIND = "encoder"
_DEVICE_FILES = "ort_encoder"
_SPARE = 64 << 20


@dataclass(frozen=True)
class EncoderPlan:
    """Everything about an encoder's export that config.json and the headers tell; no weight has been read."""

    checkpoint: Checkpoint
    encoder: Encoder
    target: Target
    lowered: LoweredModel
    max_seq_len: int
    weight_bytes: int
    """Bytes of all initializers of the graph, each counted once."""
    written_bytes: int
    """Bytes that will be written to disk (the rest is linked)."""
    forms: FormPlan


def plan_encoder(
    model_dir: Path,
    *,
    target: str = "ort",
    dtype: str = "float32",
    max_seq_len: int | None = None,
    num_layers: int | None = None,
    optimize_for: str = "balanced",
    forms: Sequence[tuple[str, str]] = (),
    memory_budget: int | None = None,
    einsum: bool = False,
    constants: Device = CPU,
) -> EncoderPlan:
    """Lower the encoder in ``model_dir`` without reading a weight; arguments as in export.plan_export.

    Raises UsageError, CheckpointError, UnsupportedError; the last for target trt, which takes decoders only.
    """
    chosen = target_named(target)
    if chosen.dialect.typed:
        raise UnsupportedError(
            f"--target {target}: takes decoders; give an encoder --target onnx, whose graph is standard ONNX, or ort."
        )
    numpy_dtype = dtype_named(dtype, chosen)
    checkpoint = open_checkpoint(model_dir)
    encoder = encoder_of(checkpoint.config, checkpoint.store, num_layers)
    length = max_seq_len or encoder.max_positions
    if not 0 < length <= encoder.max_positions:
        raise UsageError(f"--max-seq-len {length}: the model knows positions 1 to {encoder.max_positions}.")
    planned, lowered, weight_bytes = lower_planned(
        encoder_factors(encoder, checkpoint),
        FormOptions(optimize_for, forms, memory_budget, einsum, constants),
        numpy_dtype,
        lambda plan: lower_encoder(encoder, checkpoint, chosen.dialect, dtype=numpy_dtype, plan=plan),
    )
    return EncoderPlan(
        checkpoint, encoder, chosen, lowered, length, weight_bytes, lowered.weights.streamed_bytes, planned
    )


def export_encoder(
    model_dir: Path | str,
    output: Path | str,
    *,
    overwrite: bool = False,
    verify: bool = True,
    progress: Progress = SILENT,
    **options: Any,
) -> ExportResult:
    """Write the encoder in ``model_dir`` as an ONNX folder and, unless ``verify`` is off, prove it against PyTorch.

    ``options``: those of `plan_encoder`. Otherwise as export.export.
    """
    began = time.monotonic()
    source, output = Path(model_dir), Path(output)
    plan = plan_encoder(source, **options)
    check_output(output, overwrite=overwrite, inputs=(source,))
    if verify:
        _require_verification()
    require_space(output, plan.written_bytes + _SPARE, "the exported model")
    digests = check_finite(plan.checkpoint.store, progress=progress, digests=True)
    with staged_folder(output, overwrite=overwrite, inputs=(source,)) as folder:
        linked = _write(plan, folder, digests, progress)
        manifest = load_object(folder / FILE)
    finished = partial(ExportResult, output, plan, manifest, linked)
    if not verify:
        return finished(time.monotonic() - began)
    from mixt_export.verification import verify as prove

    report = prove(output, source, progress=progress)
    return finished(time.monotonic() - began, report)


def _write(plan: EncoderPlan, folder: Path, digests: Mapping[str, str], progress: Progress) -> bool:
    """Fill ``folder``; returns whether every weight file could be hardlinked."""
    linked, files = write_model(plan.checkpoint, plan.lowered, _DEVICE_FILES, folder, digests, progress)
    write_json(folder / FILE, _manifest(plan, files))
    return linked


def _manifest(plan: EncoderPlan, files: Mapping[str, Any]) -> dict[str, Any]:
    encoder, checkpoint, lowered, dialect = plan.encoder, plan.checkpoint, plan.lowered, plan.target.dialect
    return {
        "schema": SCHEMA,
        "kind": KIND,
        "tool": {"name": "mixt-export", "version": __version__},
        "target": plan.target.name,
        "dialect": dialect.name,
        "opset": dialect.opset,
        "dtype": lowered.weights.dtype,
        "padding": "right",
        "model": {
            "model_type": encoder.model_type,
            "layers": len(encoder.blocks),
            "hidden_size": encoder.hidden_size,
            "heads": encoder.heads,
        },
        "limits": {"max_seq_len": plan.max_seq_len},
        "vocab_size": encoder.vocab_size,
        "pad_token_id": special_token_ids(checkpoint)["pad_token_id"],
        "outputs": {"last_hidden_state": "float32", "sentence_embedding": "mean over tokens, length 1, float32"},
        "memory": {"weight_bytes": plan.weight_bytes},
        "graph": {"nodes": len(lowered.model.graph)},
        "source": {"format": checkpoint.format, "info": dict(checkpoint.info)},
        "linears": {linear.name: linear_entry(checkpoint, lowered, linear.name) for linear in encoder.linears},
        **({"plan": plan_entry(plan.forms)} if plan.forms.choices else {}),
        "files": dict(files),
    }


def _require_verification() -> None:
    from mixt_export.optional import require

    for package in ("torch", "transformers"):
        require(package, "verifying the export against PyTorch (switch it off with --no-verify)")
