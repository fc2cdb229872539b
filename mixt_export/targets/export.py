"""Export a model folder: plan from headers, write a staged folder, prove it."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import onnx_ir as ir

from mixt_export.checkpoints import Checkpoint, check_finite, open_checkpoint
from mixt_export.checkpoints.strictjson import load_object, load_optional
from mixt_export.errors import MixtError, UsageError
from mixt_export.families import Decoder, decoder_of
from mixt_export.lower import LoweredModel, factors_of, lower_decoder
from mixt_export.lower.overflow import Extremes, islands_for
from mixt_export.lower.precision import Islands
from mixt_export.lower.weights import STREAMED_FILE, itemsize, write_streamed
from mixt_export.plan import FormPlan, choose_forms
from mixt_export.progress import SILENT, Progress
from mixt_export.resources import resource
from mixt_export.staging import check_output, link_or_copy, require_space, staged_folder
from mixt_export.targets.genai import genai_config
from mixt_export.targets.manifest import FILE, build_manifest
from mixt_export.targets.registry import Target, dtype_named, target_named
from mixt_export.targets.trt import TrtOptions, TrtSettings, dialect_for, joined, named_islands, settle

GRAPH_FILE = "model.onnx"

#: Positions in the rotary tables unless asked otherwise: long contexts cost table space and are rare on a device.
DEFAULT_MAX_SEQ_LEN = 8192

#: Bytes of masks, shapes and scalars that no checkpoint holds.
_SLACK = 1 << 20


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
    forms: FormPlan
    """Executable forms of the MixT linears, and why."""
    trt: TrtSettings | None = None
    """Board, engine limits and profiles; of target trt only."""
    islands: Islands = field(default_factory=Islands)
    """What the graph computes in float32 besides norms and softmax."""
    extremes: Extremes | None = None
    """What the overflow scan saw, where it ran."""

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
    optimize_for: str = "balanced",
    forms: Sequence[tuple[str, str]] = (),
    trt: TrtOptions | None = None,
    extremes: Extremes | None = None,
) -> ExportPlan:
    """Lower ``model_dir`` without reading a weight.

    dtype: "fp32", "fp16" or, for target trt, "bf16" (or numpy's names). max_seq_len: at most the model's
    max_position_embeddings; default that, or 8192 where it is larger. num_layers: only the first blocks, for a quick
    look. optimize_for: what the forms of MixT linears are chosen for, a key of plan.OBJECTIVES; forms: (regular
    expression, form) for those it matches. trt: board and engine limits of target trt; extremes: what an overflow scan
    saw, which decides its float32 islands.
    Raises UsageError, CheckpointError, UnsupportedError.
    """
    chosen, options = _target(target, trt)
    numpy_dtype = dtype_named(dtype, chosen)
    checkpoint = open_checkpoint(model_dir)
    decoder = decoder_of(checkpoint.config, num_layers)
    length = max_seq_len or min(decoder.max_positions, DEFAULT_MAX_SEQ_LEN)
    if not 0 < length <= decoder.max_positions:
        raise UsageError(f"--max-seq-len {length}: the model knows positions 1 to {decoder.max_positions}.")
    planned = choose_forms(factors_of(decoder, checkpoint), optimize_for, forms)
    settings, islands = None, Islands()
    if options is not None:
        _needs_16_bits(options, numpy_dtype)
        settings = settle(options, decoder, length)
        islands = named_islands(options.islands, decoder)
        if extremes is not None:
            islands = joined(islands, islands_for(extremes, decoder), decoder)
    lowered = lower_decoder(
        decoder,
        checkpoint,
        chosen.dialect,
        dtype=numpy_dtype,
        max_seq_len=length,
        islands=islands,
        plan=planned,
    )
    weight_bytes = _initializer_bytes(lowered.model)
    _guard(lowered, planned, weight_bytes)
    return ExportPlan(
        checkpoint,
        decoder,
        chosen,
        lowered,
        length,
        weight_bytes,
        lowered.weights.streamed_bytes,
        planned,
        settings,
        islands,
        extremes,
    )


def _needs_16_bits(options: TrtOptions, dtype: str) -> None:
    """Raise UsageError for options that mean something at a narrower ``dtype`` only."""
    if options.islands and dtype == "float32":
        raise UsageError("--island: everything is float32 at --dtype fp32; leave it out, or choose --fp16 or --bf16.")
    if options.scan and dtype != "float16":
        raise UsageError(
            f"--scan looks for what overflows float16, the export is {dtype}; leave it out, or add --fp16."
        )


def _target(name: str, trt: TrtOptions | None) -> tuple[Target, TrtOptions | None]:
    """The target, of TensorRT's with the dialect its options ask for, and those options (None for other targets)."""
    chosen = target_named(name)
    if chosen.dialect.typed:
        options = trt or TrtOptions()
        return replace(chosen, dialect=dialect_for(options)), options
    if trt is not None and trt.given():
        raise UsageError(f"{trt.given()[0]} is an option of --target trt, not of --target {name}; add --target trt.")
    return chosen, None


def export(
    model_dir: Path | str,
    output: Path | str,
    *,
    target: str = "ort",
    dtype: str = "float32",
    max_seq_len: int | None = None,
    num_layers: int | None = None,
    optimize_for: str = "balanced",
    forms: Sequence[tuple[str, str]] = (),
    trt: TrtOptions | None = None,
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
    replan = partial(
        plan_export,
        source,
        target=target,
        dtype=dtype,
        max_seq_len=max_seq_len,
        num_layers=num_layers,
        optimize_for=optimize_for,
        forms=forms,
        trt=trt,
    )
    plan = replan()
    check_output(output, overwrite=overwrite, inputs=(source,))
    if verify:
        _require_verification(plan.max_seq_len)
    require_space(output, plan.written_bytes + (64 << 20), "the exported model")
    digests = check_finite(plan.checkpoint.store, progress=progress, digests=True)
    if _scans(plan, trt, verify):
        from mixt_export.verification.overflow import scan

        plan = replan(extremes=scan(plan.checkpoint, plan.decoder, max_length=plan.max_seq_len, progress=progress))
    with staged_folder(output, overwrite=overwrite, inputs=(source,)) as folder:
        linked = _write(plan, folder, digests, progress)
        if plan.trt is not None:
            _write_device(source, folder, golden=verify, progress=progress)
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
        forms=plan.forms,
        files=files,
        trt=_trt_manifest(plan),
    )
    if plan.target.genai:
        generation = load_optional(folder / "generation_config.json")
        _write_json(folder / "genai_config.json", genai_config(manifest, checkpoint.config, generation))
    _write_json(folder / FILE, manifest)
    return all(linked)


def _write_device(source: Path, folder: Path, *, golden: bool, progress: Progress) -> None:
    """OUT/device of a TensorRT folder: the board's scripts and, with ``golden``, what PyTorch computes."""
    from mixt_export.building import record_golden, write_bundle

    device = write_bundle(folder)
    if golden:
        record_golden(source, folder, device / "golden", progress=progress)


def _scans(plan: ExportPlan, options: TrtOptions | None, verify: bool) -> bool:
    """Whether to look for overflow first: where asked to, else for a float16 engine that will be verified too."""
    if plan.trt is None or plan.lowered.weights.dtype != "float16":
        return False
    wanted = None if options is None else options.scan
    return verify if wanted is None else wanted


def _trt_manifest(plan: ExportPlan) -> dict[str, Any] | None:
    if plan.trt is None:
        return None
    seen = plan.extremes
    overflow = None if seen is None else {"tokens": seen.tokens, "largest": seen.largest()}
    return plan.trt.manifest(plan.islands, overflow)


def _place(path: Path, folder: Path) -> bool:
    require_space(folder, path.stat().st_size if path.stat().st_dev != folder.stat().st_dev else 0, path.name)
    return link_or_copy(path, folder / path.name)


def _require_verification(max_seq_len: int) -> None:
    from mixt_export.optional import require
    from mixt_export.verification.options import SHORTEST

    if max_seq_len < SHORTEST:
        raise UsageError(
            f"--max-seq-len {max_seq_len}: verifying takes at least {SHORTEST} positions; raise it, or switch "
            "verification off with --no-verify."
        )

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


def _guard(lowered: LoweredModel, forms: FormPlan, weight_bytes: int) -> None:
    """No pass may re-densify: the graph holds at most the planned weights, the rotary tables and constants.

    Planned are the checkpoint's parameters, with what the chosen forms hold in place of the cores of MixT linears.
    """
    weights = lowered.weights
    factors = weights.checkpoint.factors
    elsewhere = {ref.name for name, linear in factors.items() if name not in forms.choices for ref in linear.tensors()}
    cores = sum(size for name, size in forms.cores().items() if name not in elsewhere)
    stored = sum(prod(tensor.ref.shape) for tensor in weights.checkpoint.store.values())
    planned = (stored - cores + forms.planned_elements) * itemsize(weights.dtype)
    tables = sum(entry.nbytes for entry in weights.streamed if entry.name.startswith("/rotary/"))
    if weight_bytes > planned + tables + _SLACK:
        raise MixtError(
            f"the graph holds {weight_bytes} bytes of weights, planned were {planned} and the rotary tables {tables}: "
            "the lowering rebuilt dense weights. Please report this."
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
