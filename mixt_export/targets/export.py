"""Export a model folder: plan from headers, write a staged folder, prove it."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import onnx_ir as ir

from mixt_export.checkpoints import Checkpoint, check_finite, open_checkpoint
from mixt_export.checkpoints.strictjson import load_object, load_optional
from mixt_export.errors import MixtError, UsageError
from mixt_export.families import Decoder, decoder_of
from mixt_export.lower import LoweredModel, lower_decoder
from mixt_export.lower.weights import STREAMED_FILE, itemsize, write_streamed
from mixt_export.progress import SILENT, Progress
from mixt_export.resources import resource
from mixt_export.staging import check_output, link_or_copy, require_space, staged_folder
from mixt_export.targets.genai import genai_config
from mixt_export.targets.manifest import FILE, build_manifest
from mixt_export.targets.registry import Target, dtype_named, target_named

GRAPH_FILE = "model.onnx"

#: Positions in the rotary tables unless asked otherwise: long contexts cost table space and are rare on a device.
DEFAULT_MAX_SEQ_LEN = 8192


@dataclass(frozen=True)
class ExportPlan:
    """Everything about an export that config.json and the headers tell; no weight has been read."""

    checkpoint: Checkpoint
    decoder: Decoder
    target: Target
    lowered: LoweredModel
    max_seq_len: int
    weight_bytes: int
    """Bytes of all initializers of the graph, each counted once."""
    written_bytes: int
    """Bytes that will be written to disk (the rest is linked)."""

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes one token adds to the cache."""
        return self.decoder.kv_bytes_per_token(itemsize(self.lowered.weights.dtype))


@dataclass(frozen=True)
class ExportResult:
    """What was written, and whether it was proven. ``report`` is None when verification was switched off."""

    path: Path
    plan: ExportPlan
    manifest: dict[str, Any]
    linked: bool
    seconds: float
    report: Any = field(default=None)

    @property
    def ok(self) -> bool:
        """False only when verification ran and failed."""
        return self.report is None or bool(self.report.passed)


def plan_export(
    model_dir: Path,
    *,
    target: str = "ort",
    dtype: str = "float32",
    max_seq_len: int | None = None,
    num_layers: int | None = None,
) -> ExportPlan:
    """Lower ``model_dir`` without reading a weight.

    dtype: "fp32" or "fp16" (or numpy's names). max_seq_len: at most the model's max_position_embeddings; default that,
    or 8192 where it is larger. num_layers: only the first blocks, for a quick look.
    Raises UsageError, CheckpointError, UnsupportedError.
    """
    chosen, numpy_dtype = target_named(target), dtype_named(dtype)
    checkpoint = open_checkpoint(model_dir)
    decoder = decoder_of(checkpoint.config, num_layers)
    length = max_seq_len or min(decoder.max_positions, DEFAULT_MAX_SEQ_LEN)
    if not 0 < length <= decoder.max_positions:
        raise UsageError(f"--max-seq-len {length}: the model knows positions 1 to {decoder.max_positions}.")
    lowered = lower_decoder(decoder, checkpoint, chosen.dialect, dtype=numpy_dtype, max_seq_len=length)
    weight_bytes = _initializer_bytes(lowered.model)
    _guard(lowered, weight_bytes)
    return ExportPlan(
        checkpoint, decoder, chosen, lowered, length, weight_bytes, written_bytes=lowered.weights.streamed_bytes
    )


def export(
    model_dir: Path | str,
    output: Path | str,
    *,
    target: str = "ort",
    dtype: str = "float32",
    max_seq_len: int | None = None,
    num_layers: int | None = None,
    overwrite: bool = False,
    verify: bool = True,
    progress: Progress = SILENT,
) -> ExportResult:
    """Write ``model_dir`` as an ONNX folder at ``output`` and, unless ``verify`` is off, prove it against PyTorch.

    The folder appears whole or not at all; one that fails verification stays, with its report, and ``ok`` is False.
    Other arguments: see plan_export. Raises UsageError, CheckpointError, UnsupportedError, ResourceError, and
    MissingDependencyError when verification is wanted and PyTorch is absent.
    """
    began = time.monotonic()
    source, output = Path(model_dir), Path(output)
    plan = plan_export(source, target=target, dtype=dtype, max_seq_len=max_seq_len, num_layers=num_layers)
    check_output(output, overwrite=overwrite, inputs=(source,))
    if verify:
        _require_verification()
    require_space(output, plan.written_bytes + (64 << 20), "the exported model")
    digests = check_finite(plan.checkpoint.store, progress=progress, digests=True)
    with staged_folder(output, overwrite=overwrite, inputs=(source,)) as folder:
        linked = _write(plan, folder, digests, progress)
        manifest = load_object(folder / FILE)
    result = ExportResult(output, plan, manifest, linked, time.monotonic() - began)
    if not verify:
        return result
    from mixt_export.verification import verify as prove

    report = prove(output, source, progress=progress)
    return ExportResult(output, plan, manifest, linked, time.monotonic() - began, report)


def _write(plan: ExportPlan, folder: Path, digests: dict[str, str], progress: Progress) -> bool:
    """Fill ``folder``; returns whether every weight file could be hardlinked."""
    checkpoint, weights = plan.checkpoint, plan.lowered.weights
    linked = [_place(path, folder) for path in sorted(weights.linked)]
    write_streamed(weights, folder, progress)
    ir.save(plan.lowered.model, folder / GRAPH_FILE)
    for path in (checkpoint.path / "config.json", *checkpoint.companions()):
        shutil.copyfile(path, folder / path.name)
    if plan.target.device_files is not None:
        shutil.copytree(
            resource("runtimes") / plan.target.device_files, folder / "device", ignore=shutil.ignore_patterns("__*")
        )
    files = {path.name: {"bytes": path.stat().st_size, "sha256": digests[path.name]} for path in weights.linked}
    for name in (GRAPH_FILE, STREAMED_FILE):
        if (folder / name).is_file():
            files[name] = {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)}
    manifest = build_manifest(
        plan.target,
        checkpoint,
        plan.decoder,
        plan.lowered,
        max_seq_len=plan.max_seq_len,
        weight_bytes=plan.weight_bytes,
        files=files,
    )
    if plan.target.genai:
        generation = load_optional(folder / "generation_config.json")
        _write_json(folder / "genai_config.json", genai_config(manifest, checkpoint.config, generation))
    _write_json(folder / FILE, manifest)
    return all(linked)


def _place(path: Path, folder: Path) -> bool:
    require_space(folder, path.stat().st_size if path.stat().st_dev != folder.stat().st_dev else 0, path.name)
    return link_or_copy(path, folder / path.name)


def _require_verification() -> None:
    from mixt_export.optional import require

    require("torch", "verifying the export against PyTorch (switch it off with --no-verify)")
    require("transformers", "verifying the export against PyTorch (switch it off with --no-verify)")


def _initializer_bytes(model: ir.Model) -> int:
    seen = {}
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None:
            key = (getattr(tensor, "location", value.name), getattr(tensor, "offset", None))
            seen[key] = tensor.nbytes
    return sum(seen.values())


def _guard(lowered: LoweredModel, weight_bytes: int) -> None:
    """No pass may re-densify: the graph holds at most the checkpoint's parameters, the rotary tables and constants."""
    weights = lowered.weights
    stored = sum(prod(tensor.ref.shape) for tensor in weights.checkpoint.store.values()) * itemsize(weights.dtype)
    tables = sum(entry.nbytes for entry in weights.streamed if entry.name.startswith("/rotary/"))
    if weight_bytes > stored + tables + (1 << 20):
        raise MixtError(
            f"the graph holds {weight_bytes} bytes of weights, the checkpoint {stored} and the rotary tables {tables}: "
            "the lowering rebuilt dense weights. Please report this."
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
