"""Output folders appear whole or not at all: write beside the target, then rename."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mixt_export.errors import ResourceError, UsageError

#: A folder holding one of these was made by this tool and may be replaced on request.
MARKERS = ("mixt_manifest.json", "mixt_factors.json", "mixt_sample.json")


@contextmanager
def staged_folder(output: Path, *, overwrite: bool = False, inputs: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Yield a temporary folder beside ``output`` that becomes ``output`` when the block succeeds.

    On any exception, KeyboardInterrupt included, the temporary folder is removed and ``output`` is as it was.
    Raises UsageError when ``output`` holds something and ``overwrite`` is off, when it was not made by this tool,
    or when it contains one of ``inputs``.
    """
    output = output.absolute()
    check_output(output, overwrite=overwrite, inputs=inputs)
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{output.name}.tmp-", dir=output.parent))
    try:
        staging.chmod(0o755)
        yield staging
        _replace(staging, output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_output(output: Path, *, overwrite: bool, inputs: tuple[Path, ...] = ()) -> None:
    """Raise UsageError unless ``output`` may be written (see staged_folder); touches nothing."""
    resolved = output.resolve()
    for given in inputs:
        if given.resolve() == resolved or resolved in given.resolve().parents:
            raise UsageError(f"{output}: the output folder is or contains the input {given}; choose another with -o.")
    if not output.exists() and not output.is_symlink():
        return
    if not output.is_dir() or output.is_symlink():
        raise UsageError(f"{output}: exists and is not a folder; choose another output with -o.")
    if not any(output.iterdir()):
        return
    if not overwrite:
        raise UsageError(f"{output}: the output folder is not empty; pass --overwrite to replace it.")
    if not any((output / marker).is_file() for marker in MARKERS):
        raise UsageError(
            f"{output}: holds files this tool did not write, so --overwrite will not replace it; "
            "choose another output with -o."
        )


def _replace(staging: Path, output: Path) -> None:
    """Move ``staging`` to ``output``; what was there is set aside first and put back if the move fails."""
    if not output.exists():
        staging.rename(output)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{output.name}.old-", dir=output.parent))
    old = aside / output.name
    output.rename(old)
    try:
        staging.rename(output)
    except BaseException:
        old.rename(output)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raise ResourceError unless the disk that holds ``folder`` has ``needed`` free bytes."""
    probe = folder.absolute()
    while not probe.exists():
        probe = probe.parent
    free = shutil.disk_usage(probe).free
    if free < needed:
        raise ResourceError(
            f"{what} needs {needed / 1e6:.1f} MB in {folder}, but only {free / 1e6:.1f} MB are free; "
            "free some space or choose another disk with -o."
        )


def link_or_copy(source: Path, target: Path) -> bool:
    """Hardlink ``source`` to ``target``, or copy it where links cannot be made. Returns True for a link."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
        return False
    return True
