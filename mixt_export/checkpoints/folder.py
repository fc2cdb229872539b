"""Open a model folder: ask each known format whether it recognises it."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from mixt_export.checkpoints import foreign, huggingface, mixt
from mixt_export.checkpoints.checkpoint import Checkpoint
from mixt_export.errors import CheckpointError, MixtError, UnsupportedError


class Format(Protocol):
    """What a format module offers."""

    NAME: str

    def recognise(self, folder: Path) -> str | None:
        """Why ``folder`` is of this format, or None. Looks at file names, config.json and names of tensors only."""
        ...

    def open(self, folder: Path, reason: str) -> Checkpoint:
        """Read every header of ``folder``; raises CheckpointError or UnsupportedError."""
        ...


#: Asked in this order: a factorised folder also looks like a Hugging Face folder.
FORMATS: tuple[Format, ...] = (mixt, *foreign.FORMATS, huggingface)

#: File name patterns of formats that are not read, and what to do about each.
_ELSEWHERE = {
    "mixt_manifest.json": (CheckpointError, "is an exported folder; pass the model folder that it was made from"),
    "pytorch_model*.bin*": (
        CheckpointError,
        "holds shards of pickled weights without pytorch_model.bin.index.json; download the index too",
    ),
    "*.pth": (UnsupportedError, "holds pickled weights, which are not read; convert them to a Hugging Face folder"),
    "*.gguf": (UnsupportedError, "holds GGUF weights, which are not read; use the model's Hugging Face folder"),
}


def recognise(folder: Path) -> tuple[Format, str]:
    """The format of the model folder ``folder`` and the reason. Raises CheckpointError or UnsupportedError."""
    folder = Path(folder)
    if not folder.exists():
        raise CheckpointError(f"{folder}: there is no such folder; pass the path of a local model folder.")
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: is a file; pass the model folder that holds it.")
    for known in FORMATS:
        reason = known.recognise(folder)
        if reason is not None:
            return known, reason
    for pattern, (error, remedy) in _ELSEWHERE.items():
        if next(folder.glob(pattern), None) is not None:
            raise error(f"{folder}: {remedy}.")
    raise CheckpointError(
        f"{folder}: is not a model folder: it has neither model.safetensors nor model.safetensors.index.json; "
        "pass the folder that holds config.json and the weights."
    )


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Open the model folder ``folder``: config.json, the headers of its weights, its factors.

    No weight is read. Raises CheckpointError (missing, corrupt or inconsistent files), NetworkError (a factorised
    linear that is inconsistent) or UnsupportedError (pickled or quantised weights, a newer version of the format).
    """
    known, reason = recognise(Path(folder))
    return known.open(Path(folder), reason)


def companion(folder: Path, name: str) -> Path | None:
    """The file ``name`` that belongs to the model in ``folder``: its own, or that of the model it builds on, or None.

    ``folder`` may be an exported folder, whose files are its own.
    """
    path = folder / name
    if path.is_file():
        return path
    try:
        return open_checkpoint(folder).companion(name)
    except MixtError:
        return None
