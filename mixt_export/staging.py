"""Output folders appear whole or not at all: write beside the target, then rename."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import string
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mixt_export.errors import ResourceError, UsageError

try:
    import fcntl
except ModuleNotFoundError:  # not POSIX: nothing says whether a leftover is still being written, so none is touched
    fcntl = None  # type: ignore[assignment]

#: A folder holding one of these was made by this tool and may be replaced on request.
MARKERS = ("mixt_manifest.json", "mixt_factors.json", "mixt_sample.json", "mixt_convert.json")

_LETTERS = string.ascii_lowercase + string.digits + "_"


@contextmanager
def staged_folder(output: Path, *, overwrite: bool = False, inputs: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Yield a temporary folder beside ``output`` that becomes ``output`` when the block succeeds.

    On any exception, KeyboardInterrupt included, the temporary folder is removed and ``output`` is as it was. What a
    killed process left beside ``output`` is cleared away first (see clear_leftovers).
    Raises UsageError when ``output`` holds something and ``overwrite`` is off, when it was not made by this tool,
    or when it contains one of ``inputs``.
    """
    output = output.absolute()
    clear_leftovers(output)
    check_output(output, overwrite=overwrite, inputs=inputs)
    output.parent.mkdir(parents=True, exist_ok=True)
    with beside(output, "tmp") as staging:
        staging.chmod(0o755)
        yield staging
        _replace(staging, output)


def clear_leftovers(output: Path) -> None:
    """Remove what killed processes left beside ``output``; put an earlier output back that one of them had set aside.

    Whoever writes such a folder holds a lock on it, which ends with the process; a folder that is locked stays.
    """
    if fcntl is None or not output.parent.is_dir():
        return
    ours = re.compile(rf"\.{re.escape(output.name)}\.(tmp|old|scratch)-[a-z0-9_]{{8}}")
    for folder in sorted(output.parent.iterdir()):
        found = ours.fullmatch(folder.name)
        if found is None or folder.is_symlink() or not folder.is_dir():
            continue
        lock = _lock(folder, wait=False)
        if lock is None:
            continue
        try:
            if found[1] == "old" and (folder / output.name).is_dir() and not output.exists():
                (folder / output.name).rename(output)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)


@contextmanager
def beside(output: Path, kind: str) -> Iterator[Path]:
    """A new locked folder ``.OUT.KIND-…`` beside ``output``, removed afterwards with what is still in it.

    ``kind``: tmp (becomes the output), old (holds the one before), scratch (intermediate results).
    """
    folder: Path | None = None
    lock: int | None = None
    try:
        while folder is None:
            # The name is known before the folder is made: an interruption right after that must find it to remove it.
            folder = output.parent / f".{output.name}.{kind}-{''.join(secrets.choice(_LETTERS) for _ in range(8))}"
            try:
                folder.mkdir(mode=0o700)
            except FileExistsError:
                folder = None
                continue
            lock = _lock(folder, wait=True) if fcntl is not None else None
            # Between the two calls another process may have taken the folder for a leftover and removed it.
            if not folder.is_dir() or (lock is not None and folder.stat().st_ino != os.fstat(lock).st_ino):
                if lock is not None:
                    os.close(lock)
                folder, lock = None, None
        yield folder
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _lock(folder: Path, *, wait: bool) -> int | None:
    """A descriptor that holds the lock of ``folder`` until it is closed or the process ends; None if it has it not."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # it is gone by now, or belongs to somebody else
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


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
    with beside(output, "old") as aside:
        old = aside / output.name
        output.rename(old)
        try:
            staging.rename(output)
        except BaseException:
            old.rename(output)
            raise


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
