"""Export a model folder: plan from headers, write a staged folder, prove it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixt_export.checkpoints import Checkpoint, check_finite, open_checkpoint
from mixt_export.checkpoints.strictjson import load_object, load_optional
from mixt_export.errors import UsageError
from mixt_export.families import Decoder, decoder_of
from mixt_export.lower import LoweredModel, factors_of, lower_decoder
from mixt_export.lower.overflow import Extremes, islands_for
from mixt_export.lower.precision import Islands
from mixt_export.lower.weights import itemsize
from mixt_export.plan import CPU, Device, FormPlan, Gpu
from mixt_export.plan.variants import checked_mode
from mixt_export.progress import SILENT, Progress
from mixt_export.quantisation import Quantisation
from mixt_export.quantisation.cache import CacheScales, Int8Cache
from mixt_export.staging import check_output, require_space, staged_folder
from mixt_export.targets.files import initializer_bytes, write_json, write_model
from mixt_export.targets.genai import genai_config
from mixt_export.targets.manifest import FILE, build_manifest
from mixt_export.targets.planning import FormOptions, lower_planned
from mixt_export.targets.quantise import (
    CachePlan,
    QuantisedPlan,
    check_int8_activations,
    check_int8_cache,
    check_quantisation,
    quantised_pairs,
    quantised_plan,
)
from mixt_export.targets.registry import Target, dtype_named, target_named
from mixt_export.targets.rewriting import Rewriting, Rewritten, behind_passes
from mixt_export.targets.rounded import as_floats, write_rounded
from mixt_export.targets.trt import TrtOptions, TrtSettings, dialect_for, joined, named_islands, settle

if TYPE_CHECKING:
    from mixt_export.targets.encoder import EncoderPlan


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
    forms: FormPlan
    """Executable forms of the factorised linears, and why."""
    trt: TrtSettings | None = None
    """Board, engine limits and profiles; of target trt only."""
    islands: Islands = field(default_factory=Islands)
    """What the graph computes in float32 besides norms and softmax."""
    extremes: Extremes | None = None
    """What the overflow scan saw, where it ran."""
    quantised: QuantisedPlan | None = None
    """The matrices that became blocks of integers."""
    passes: Mapping[str, Any] = field(default_factory=dict)
    """What passes over the checkpoint did, by their names."""
    cache: CachePlan | None = None
    """Keys and values at 8 bits."""

    @property
    def cache_dtype(self) -> str:
        """Of keys and values in the cache."""
        return self.lowered.weights.dtype if self.cache is None else "int8"

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes one token adds to the cache."""
        return self.decoder.kv_bytes_per_token(itemsize(self.cache_dtype))


@dataclass(frozen=True)
class ExportResult:
    """What was written, and whether it was proven. ``report`` is None when verification was switched off."""

    path: Path
    plan: ExportPlan | EncoderPlan
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
    memory_budget: int | None = None,
    variants: str = "auto",
    einsum: bool = False,
    constants: Device | Gpu = CPU,
    trt: TrtOptions | None = None,
    extremes: Extremes | None = None,
    quantisation: Quantisation | None = None,
    rewritten: Rewritten | None = None,
    forms_at: str | None = None,
    int8_cache: Int8Cache | None = None,
) -> ExportPlan:
    """Lower ``model_dir`` without reading a weight.

    dtype: "fp32", "fp16" or, for target trt, "bf16" (or numpy's names). max_seq_len: at most the model's
    max_position_embeddings; default that, or 8192 where it is larger. num_layers: only the first blocks, for a quick
    look. optimize_for, forms, memory_budget, einsum: how factorised linears are executed, see planning.FormOptions;
    variants: auto, one or none, see plan.variants; for
    target trt by the costs of the board, or of an AGX Orin where none is named, else of the CPU ``constants``. trt:
    board and engine limits of target trt; extremes: what an overflow scan saw, which decides its float32 islands.
    quantisation: weights of few bits (docs/quantisation.md); forms are then chosen as for floats, without variants.
    rewritten: ``model_dir`` behind the passes of targets.rewriting. forms_at: the numpy dtype by whose costs forms are
    chosen, by default that of the export. int8_cache: keys and values at 8 bits (docs/quantisation.md).
    Raises UsageError, CheckpointError, UnsupportedError, and ResourceError when nothing fits the memory budget.
    """
    chosen, options = _target(target, trt)
    numpy_dtype = dtype_named(dtype, chosen)
    if quantisation is not None:
        if quantisation.int8_activations:
            check_int8_activations(chosen, numpy_dtype)
        check_quantisation(chosen, numpy_dtype, memory_budget, variants)
        variants = "none" if variants == "auto" else variants
    if int8_cache is not None:
        check_int8_cache(chosen, numpy_dtype)
    scales = None if int8_cache is None else CacheScales()
    checkpoint = open_checkpoint(model_dir) if rewritten is None else rewritten.checkpoint
    decoder = decoder_of(checkpoint.config, num_layers)
    length = max_seq_len or min(decoder.max_positions, DEFAULT_MAX_SEQ_LEN)
    if not 0 < length <= decoder.max_positions:
        raise UsageError(f"--max-seq-len {length}: the model knows positions 1 to {decoder.max_positions}.")
    settings, islands = None, Islands()
    if options is not None:
        _needs_16_bits(options, numpy_dtype)
        settings = settle(options, decoder, length)
        islands = named_islands(options.islands, decoder)
        if extremes is not None:
            islands = joined(islands, islands_for(extremes, decoder), decoder)
    costs = forms_at or numpy_dtype
    device = constants if settings is None else settings.board.gpu(itemsize(costs))
    planned, lowered, weight_bytes = lower_planned(
        factors_of(decoder, checkpoint, chosen.dialect),
        FormOptions(optimize_for, forms, memory_budget, einsum, device, checked_mode(variants, chosen.dialect.typed)),
        costs,
        lambda plan: lower_decoder(
            decoder,
            checkpoint,
            chosen.dialect,
            dtype=numpy_dtype,
            max_seq_len=length,
            islands=islands,
            plan=plan,
            int8_cache=scales,
        ),
    )
    quantised = None
    if quantisation is not None:
        quantised = quantised_plan(lowered, chosen, decoder.embedding, quantisation)
        weight_bytes = initializer_bytes(lowered.model)
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
        quantised,
        {} if rewritten is None else rewritten.record,
        None if scales is None or int8_cache is None else CachePlan(int8_cache, scales),
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
    memory_budget: int | None = None,
    variants: str = "auto",
    einsum: bool = False,
    constants: Device = CPU,
    trt: TrtOptions | None = None,
    quantisation: Quantisation | None = None,
    int8_cache: Int8Cache | None = None,
    rewriting: Rewriting | None = None,
    overwrite: bool = False,
    verify: bool = True,
    progress: Progress = SILENT,
) -> ExportResult:
    """Write ``model_dir`` as an ONNX folder at ``output`` and, unless ``verify`` is off, prove it against PyTorch.

    The folder appears whole or not at all; one that fails verification stays, with its report, and ``ok`` is False.
    rewriting: passes over the checkpoint, see targets.rewriting; the proof runs against ``model_dir`` as it is stored.
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
        memory_budget=memory_budget,
        variants=variants,
        einsum=einsum,
        constants=constants,
        trt=trt,
        quantisation=quantisation,
        int8_cache=int8_cache,
    )
    plan = replan()
    check_output(output, overwrite=overwrite, inputs=(source,))
    if verify:
        _require_verification(plan.max_seq_len)
    digests = check_finite(plan.checkpoint.store, progress=progress, digests=True)
    passes = rewriting or Rewriting()
    quantised = quantisation is not None
    if quantised and passes.detect_low_rank is not None:
        raise UsageError("--detect-low-rank with --quantize: detect first, into a model folder; leave one out.")
    dtype_written, pairs = plan.lowered.weights.dtype, quantised_pairs(plan.quantised, plan.checkpoint)
    with behind_passes(
        plan.checkpoint, passes, dtype_written, output, quantised=quantised, pairs=pairs, progress=progress
    ) as changed:
        if changed.record:
            replan = partial(replan, rewritten=changed)
            plan = replan()
        require_space(output, plan.written_bytes + (64 << 20), "the exported model")
        if _scans(plan, trt, verify):
            from mixt_export.verification.overflow import scan

            plan = replan(extremes=scan(plan.checkpoint, plan.decoder, max_length=plan.max_seq_len, progress=progress))
        with staged_folder(output, overwrite=overwrite, inputs=(source,)) as folder:
            if plan.quantised is None and plan.cache is None:
                linked = _write(plan, folder, digests, progress)
            else:
                floats = replan(quantisation=None, int8_cache=None, **as_floats(plan, variants))
                write = partial(_write, plan, folder, digests, progress)
                linked = write_rounded(plan, floats, source, folder, write, progress)
            if plan.trt is not None:
                _write_device(plan, source, folder, golden=verify, progress=progress)
            manifest = load_object(folder / FILE)
    result = ExportResult(output, plan, manifest, linked, time.monotonic() - began)
    if not verify:
        return result
    from mixt_export.verification import verify as prove

    report = prove(output, source, progress=progress)
    return ExportResult(output, plan, manifest, linked, time.monotonic() - began, report)


def _write(plan: ExportPlan, folder: Path, digests: dict[str, str], progress: Progress) -> bool:
    """Fill ``folder``; returns whether every weight file could be hardlinked."""
    checkpoint = plan.checkpoint
    linked, files = write_model(checkpoint, plan.lowered, plan.target.device_files, folder, digests, progress)
    manifest = build_manifest(
        plan.target,
        checkpoint,
        plan.decoder,
        plan.lowered,
        max_seq_len=plan.max_seq_len,
        weight_bytes=plan.weight_bytes,
        forms=plan.forms,
        cache_dtype=plan.cache_dtype,
        files=files,
        trt=_trt_manifest(plan),
    )
    if plan.passes:
        manifest["passes"] = dict(plan.passes)
    if plan.target.genai:
        generation = load_optional(folder / "generation_config.json")
        write_json(folder / "genai_config.json", genai_config(manifest, checkpoint.config, generation))
    write_json(folder / FILE, manifest)
    return linked


def _write_device(plan: ExportPlan, source: Path, folder: Path, *, golden: bool, progress: Progress) -> None:
    """OUT/device of a TensorRT folder: the board's scripts, kernels and, with ``golden``, what PyTorch computes.

    Kernels take float weights, so a graph of integers carries none; PyTorch computes with the weights they stand for.
    """
    from mixt_export.building import record_golden, write_bundle
    from mixt_export.building.kernels.carry import carry_kernels
    from mixt_export.verification.quantised import integers_of

    device = write_bundle(folder)
    carried = carry_kernels(plan.lowered.model, device, progress) if plan.quantised is None else None
    if carried is not None:
        progress.note(carried.note)
    if golden:
        reference = source if plan.quantised is None else integers_of(folder, source)
        record_golden(reference, folder, device / "golden", progress=progress)


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
