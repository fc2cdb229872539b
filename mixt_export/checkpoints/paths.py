"""Which files of a model folder may be read: the folder's own, and the blobs of a Hugging Face cache behind them.

A folder that came from elsewhere is data: a name found inside a file must be a plain file name, and a symbolic link
must not lead out of the folder. One exception keeps downloaded models usable: the Hugging Face cache stores a model as
``<repo>/snapshots/<revision>/`` full of links into ``<repo>/blobs/``; links from a snapshot into the blobs of the
same repository are followed.
"""

from __future__ import annotations

import stat
from pathlib import Path

from mixt_export.errors import CheckpointError


def is_plain_name(name: str) -> bool:
    """Whether ``name`` is a single file name: no separator, no drive, not hidden, no control character."""
    return bool(name) and not name.startswith(".") and not set(name) & set("/\\:\0") and name.isprintable()


def own_file(folder: Path, name: str) -> Path | None:
    """``folder / name`` if that is a regular file of this model, None if there is nothing.

    Raises CheckpointError when it is a link that leads out of the folder, or is not a regular file.
    """
    path = folder / name
    if not path.exists():
        if path.is_symlink():
            raise CheckpointError(f"{path}: is a link to a file that does not exist; download or copy the model again.")
        return None
    if not stat.S_ISREG(path.stat().st_mode):
        raise CheckpointError(f"{path}: is not a regular file; put the file itself there.")
    if path.is_symlink():
        target, home = path.resolve(), folder.resolve()
        if not any(target.is_relative_to(root) for root in (home, *_cache_blobs(home))):
            raise CheckpointError(
                f"{path}: is a link that leads out of the model folder (to {target}), which is not followed; "
                "copy the file into the folder."
            )
    return path


def required_file(folder: Path, name: str, remedy: str) -> Path:
    """Like own_file, but CheckpointError with ``remedy`` when there is nothing."""
    path = own_file(folder, name)
    if path is None:
        raise CheckpointError(f"{folder / name}: the file is missing; {remedy}.")
    return path


def _cache_blobs(home: Path) -> tuple[Path, ...]:
    """The blobs folder that belongs to ``home`` when it lies in a snapshot of a Hugging Face cache."""
    for parent in home.parents:
        if parent.name == "snapshots":
            return (parent.parent / "blobs",)
    return ()
