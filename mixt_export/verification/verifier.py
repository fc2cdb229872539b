"""Run every check on an exported folder."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING

from mixt_export.checkpoints.strictjson import load_optional
from mixt_export.errors import UnsupportedError
from mixt_export.progress import SILENT, Progress
from mixt_export.verification.assembling import assemble
from mixt_export.verification.options import VerifyOptions
from mixt_export.verification.report import Report
from mixt_export.verification.result import CheckResult

if TYPE_CHECKING:
    from mixt_export.verification.checks import Check
    from mixt_export.verification.context import Context
    from mixt_export.verification.memory.measure import MemoryReport


def verify(
    exported: Path, reference: Path, *, options: VerifyOptions | None = None, progress: Progress = SILENT
) -> Report:
    """Compare the exported folder with PyTorch float32 on the model folder it was made from.

    A parity failure is not raised: ``Report.passed`` is False and says where. Writes report.json and report.html into
    ``exported`` unless ``options.write`` is off. Raises UsageError or UnsupportedError when one of the folders cannot
    be run at all, MissingDependencyError without torch and transformers.
    """
    from mixt_export.verification.checks import CHECKS
    from mixt_export.verification.context import Context

    if load_optional(Path(exported) / "mixt_manifest.json").get("kind") == "encoder":
        from mixt_export.verification.encoder import verify_encoder

        return verify_encoder(Path(exported), Path(reference), options=options, progress=progress)
    options = options or VerifyOptions()
    started = time.monotonic()
    context = Context(Path(exported), Path(reference), options, progress)
    wanted = [check for check in CHECKS if check.applies(context)]
    results = _run_all(wanted, context, progress)
    if not all(result.passed for result in results) and context.judge_by_rounding():
        results = _run_all(wanted, context, progress)
    results = _located(results, context, progress)
    gate = context.gate
    context.release()
    memory, notes = _memory(context, progress)
    return assemble(context, gate, results, "model.layers.{}", started, memory=memory, notes=notes)


def _run_all(checks: list[Check], context: Context, progress: Progress) -> list[CheckResult]:
    results = []
    with progress.task("verifying", len(checks)) as advance:
        for check in checks:
            results.append(_run(check, context))
            advance(1)
    return results


def _run(check: Check, context: Context) -> CheckResult:
    """One check, timed; a graph that does not run as it should fails the check instead of ending the program."""
    from mixt_export.verification.session import RunFailed

    started = time.monotonic()
    try:
        result = check.run(context)
    except RunFailed as error:
        result = CheckResult(check.name, check.title, False, str(error))
    return dataclasses.replace(result, seconds=time.monotonic() - started)


def _located(results: list[CheckResult], context: Context, progress: Progress) -> list[CheckResult]:
    """The same results; the first that failed on a known route says where the fault is, and so do all of its kind."""
    from mixt_export.verification.locate import locate

    found = []
    with progress.task("looking for the fault", sum(not result.passed for result in results)) as advance:
        for result in results:
            route = context.routes.get(result.name)
            if result.passed or route is None:
                found.append(result)
                continue
            finding = locate(context, route)
            found.append(dataclasses.replace(result, where=finding.where, part=finding.part))
            advance(1)
    return found


def _memory(context: Context, progress: Progress) -> tuple[MemoryReport | None, list[str]]:
    """The memory report; a graph that prediction cannot follow costs the report, not the verification."""
    from mixt_export.verification.memory.measure import memory_report

    options, label = context.options, "measuring memory" if context.options.memory else "predicting memory"
    try:
        with progress.task(label):
            report = memory_report(
                context.graph,
                context.reference,
                context.max_length,
                threads=options.threads,
                measured=options.memory,
            )
    except UnsupportedError as error:
        return None, [f"memory was not predicted: {error}"]
    return report, report.notes
