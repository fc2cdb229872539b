"""Compress and recover as one run: what `mixt compress --recover` does."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mixt_export.checkpoints import open_checkpoint
from mixt_export.compression.recover.report import RecoverReport
from mixt_export.compression.recover.run import recover
from mixt_export.compression.recover.settings import RecoverSettings
from mixt_export.compression.report import CompressionReport
from mixt_export.compression.run import compress, plan
from mixt_export.compression.self_text import SELF
from mixt_export.errors import UsageError
from mixt_export.progress import SILENT, Progress
from mixt_export.resources import texts as shipped_texts
from mixt_export.staging import check_output

#: In ``<output>.recover``: the folder that compress wrote, and what it was made with.
STUDENT, ARGUMENTS = "compressed", "compress.json"


def compress_and_recover(
    model_dir: str | Path,
    output: str | Path,
    *,
    options: Mapping[str, Any],
    settings: RecoverSettings | None = None,
    resume: bool = False,
    progress: Progress = SILENT,
) -> tuple[CompressionReport | None, RecoverReport]:
    """``compress`` by ``options`` (its keywords), then ``recover`` of the result with ``settings``.

    Recovery trains on the files among the calibration texts (the shipped ones where there is none) and measures the
    evaluation texts of ``options`` before and after, the shipped ones where none are given; compress itself then
    scores nothing. ``output`` holds both reports. What compress wrote stands in ``<output>.recover`` until the end:
    with ``resume`` a run that was interrupted goes on from there, and the first report is None where compression was
    finished before. Equal arguments give equal bytes on one machine, interrupted or not.

    Raises UsageError where ``resume`` meets the rest of a run with other arguments, and what both functions raise.
    """
    model, target = Path(model_dir), Path(output)
    given = {**options, "overwrite": False, "evaluate": False}
    plan(model, _work(target) / STUDENT, **{**given, "overwrite": True})  # bad arguments, before anything is removed
    check_output(target, overwrite=bool(options.get("overwrite")), inputs=(model,))
    student = _work(target) / STUDENT
    made = None
    if not _is_made(target, _arguments(model, given), resume=resume):
        _clear(target)
        student.parent.mkdir(parents=True, exist_ok=True)
        made = compress(model, student, progress=progress, **given)
        (_work(target) / ARGUMENTS).write_text(json.dumps(_arguments(model, given)), encoding="utf-8")
    report = recover(
        student,
        model,
        target,
        texts=[text for text in options.get("calib") or () if text != SELF],
        eval_texts=_evaluation(options),
        settings=settings,
        seed=int(options.get("seed", 0)),
        resume=resume and made is None,
        overwrite=bool(options.get("overwrite")),
        progress=progress,
    )
    _clear(target)
    return made, report


def _evaluation(options: Mapping[str, Any]) -> list[str | Path]:
    if not options.get("evaluate", True):
        return []
    return [*(options.get("eval_text") or ())] or [*sorted(shipped_texts().glob("eval_*.txt"))]


def _work(output: Path) -> Path:
    return output.absolute().with_name(f"{output.name}.recover")


def _arguments(model: Path, options: Mapping[str, Any]) -> dict[str, str]:
    """What the compressed model depends on, in plain text."""
    digest = hashlib.sha256()
    for path in open_checkpoint(model).store.files:
        about = path.stat()
        digest.update(f"{path.name} {about.st_size} {about.st_mtime_ns}\n".encode())
    found = {name: str(value) for name, value in sorted(options.items()) if name not in ("cache", "overwrite")}
    return {**found, "model": str(model.resolve()), "files": digest.hexdigest()}


def _is_made(output: Path, arguments: Mapping[str, str], *, resume: bool) -> bool:
    """Whether an earlier run with these arguments finished compressing."""
    file = _work(output) / ARGUMENTS
    if not resume or not file.is_file():
        return False
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{file}: is damaged ({error}); leave --resume away to start anew.") from error
    if before != arguments:
        raise UsageError(
            f"{file}: belongs to a run with another model or option; repeat that run's arguments, or leave --resume "
            "away to start anew."
        )
    return (_work(output) / STUDENT).is_dir()


def _clear(output: Path) -> None:
    """Remove what earlier runs of this recipe left; files of others in the folder stay."""
    work = _work(output)
    (work / ARGUMENTS).unlink(missing_ok=True)
    shutil.rmtree(work / STUDENT, ignore_errors=True)
    with suppress(OSError):
        work.rmdir()
