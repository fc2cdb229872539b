"""compress(): from a dense model folder to a factorised one."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Unpack

from mixt_export.checkpoints import write_checkpoint
from mixt_export.compression.clock import Clock
from mixt_export.compression.held_out import HeldOut
from mixt_export.compression.job import Job, Plan, Result
from mixt_export.compression.memory import peak_rss
from mixt_export.compression.report import CompressionReport
from mixt_export.compression.request import Options, Request
from mixt_export.compression.scratch import scratch_beside
from mixt_export.progress import SILENT, Progress
from mixt_export.staging import check_output, require_space, staged_folder

REPORT_FILE = "compress_report.json"


def compress(
    model_dir: str | Path, output: str | Path, *, progress: Progress = SILENT, **options: Unpack[Options]
) -> CompressionReport:
    """Replace linears of the decoder blocks of ``model_dir`` by factors and write ``output``.

    ``method``: see method.METHODS, gfw-svd by default. ``blocks``: "last:N", "first:N", "0,3,7-9" or "all"; by default
    all for low rank and last:4 for MixT. ``include``/``exclude``: regular expressions searched in module paths.
    ``calib``: UTF-8 texts, mixed evenly, or "self" for text the model itself samples; the shipped texts when empty.
    ``settings``: see Settings. ``dtype``: of the factors; that of each source weight when None. ``seed``,
    ``overwrite``. ``cache``: True keeps statistics in the user's cache folder (statistics_cache), False keeps none, a
    path keeps them there; they change no byte of the result. ``evaluate``: score the original and the result on
    ``eval_windows`` windows of each of ``eval_text``, by default two shipped texts. The options of the method's family
    are described in families. Equal arguments give equal bytes on one machine.

    Peak memory is bounded by one block (with X' one more per stream), the embedding, and the activations at one
    block boundary; "self" also holds the whole model while it samples. Raises UsageError, CheckpointError,
    UnsupportedError or ResourceError with one sentence; ``output`` appears whole or not at all.
    """
    job = _open(model_dir, output, options)
    request, inputs = job.request, (job.checkpoint.path,)
    clock = Clock()
    held_out = HeldOut(job, progress)
    with scratch_beside(request.output) as scratch:
        require_space(request.output, job.scratch_bytes, "the temporary statistics of compress")
        result = job.run(scratch, clock, progress)
        with staged_folder(request.output, overwrite=request.overwrite, inputs=inputs) as staging:
            report = _report(job, result)
            with clock.stage("writing"):
                write_checkpoint(
                    staging,
                    job.checkpoint,
                    result.tensors,
                    result.factors,
                    _info(report),
                    progress,
                    packed=result.packed,
                )
            with clock.stage("evaluation"):
                evaluation = held_out.score(staging, result.controls, scratch)
            report = replace(
                report,
                evaluation=evaluation,
                cached=tuple(job.cache.hits),
                seconds=clock.seconds,
                peak_rss_bytes=peak_rss(),
            )
            (staging / REPORT_FILE).write_text(json.dumps(report.to_dict(), indent=1) + "\n", encoding="utf-8")
    for warning in (*report.notes, *(() if report.controls is None else report.controls.warnings)):
        progress.note(f"warning: {warning}")
    return report


def plan(model_dir: str | Path, output: str | Path, **options: Unpack[Options]) -> Plan:
    """Check the arguments of ``compress`` and say what it would do; reads no weights, writes nothing."""
    return _open(model_dir, output, options).plan()


def _open(model_dir: str | Path, output: str | Path, options: Options) -> Job:
    """Check everything that can be checked before a weight is read."""
    request = Request.of(model_dir, output, options)
    job = request.family.load_job()(request)
    check_output(request.output, overwrite=request.overwrite, inputs=(job.checkpoint.path,))
    return job


def _report(job: Job, result: Result) -> CompressionReport:
    before = sum(layer.out_features * layer.in_features for layer in result.layers)
    after = sum(layer.params for layer in result.layers)
    whole = sum(stored.ref.size for stored in job.checkpoint.store.values())
    return CompressionReport(
        method=job.request.method.name,
        recipe=job.recipe,
        keep_achieved=after / before,
        linears_params_before=before,
        linears_params_after=after,
        model_params_before=whole,
        model_params_after=whole - before + after,
        seed=job.request.seed,
        settings=asdict(job.settings),
        layers=result.layers,
        texts=result.texts,
        blocks=result.blocks,
        controls=result.controls,
        search=result.search,
        notes=result.notes,
    )


def _info(report: CompressionReport) -> dict[str, Any]:
    """What the checkpoint records: the report without what differs between equal runs."""
    info = report.to_dict()
    for name in ("seconds", "peak_rss_bytes", "evaluation", "cached"):
        del info[name]
    return info
