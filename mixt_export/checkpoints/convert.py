"""Rewrite a model folder in another format: our own, or one that other tools load."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mixt_export.checkpoints.checkpoint import Checkpoint
from mixt_export.checkpoints.folder import open_checkpoint
from mixt_export.checkpoints.foreign import peft
from mixt_export.checkpoints.writers import ablinear, own, svd_llm
from mixt_export.errors import UsageError
from mixt_export.progress import SILENT, Progress
from mixt_export.staging import check_output, staged_folder

#: Says beside converted weights where they are from; marks the folder as ours, so that --overwrite may replace it.
RECORD_FILE = "mixt_convert.json"


class Writer(Protocol):
    """What a module of writers offers."""

    NAME: str

    def check(self, source: Checkpoint) -> None:
        """Raise UnsupportedError, naming the linear, where the format cannot hold ``source``; reads no weight."""
        ...

    def write(self, folder: Path, source: Checkpoint, progress: Progress) -> None:
        """Write ``source`` into the empty ``folder``, tensor by tensor."""
        ...


WRITERS: dict[str, Writer] = {writer.NAME: writer for writer in (own, ablinear, svd_llm)}


@dataclass(frozen=True)
class Converted:
    """What ``convert`` did: formats before and after, linears that are factors."""

    source: str
    target: str
    linears: int
    path: Path


def convert(
    model_dir: str | Path,
    output: str | Path,
    to: str,
    *,
    keep_adapter: bool = False,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Converted:
    """Write the model folder ``model_dir`` in the format ``to`` (a key of WRITERS) at ``output``, staged.

    ``keep_adapter``: a LoRA adapter over dense linears stays a branch instead of being taken into the weights. Raises
    UsageError for an unknown format or an output that is in the way, UnsupportedError for networks that ``to`` cannot
    hold, and what open_checkpoint and write_checkpoint raise.
    """
    folder, path = Path(model_dir), Path(output)
    if to not in WRITERS:
        raise UsageError(f"--to {to}: is no format that is written; choose {', '.join(WRITERS)}.")
    source = open_checkpoint(folder)
    if keep_adapter:
        if source.format != peft.NAME:
            raise UsageError(f"--keep-adapter: {folder} is no LoRA adapter ({source.format}); leave it out.")
        source = peft.open(folder, peft.CONFIG, keep=True)
    writer = WRITERS[to]
    check_output(path, overwrite=overwrite, inputs=source.folders)
    writer.check(source)
    with staged_folder(path, overwrite=overwrite, inputs=source.folders) as staging:
        writer.write(staging, source, progress)
        record: dict[str, Any] = {"from": source.format, "to": to, "reason": source.reason, "info": dict(source.info)}
        (staging / RECORD_FILE).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return Converted(source.format, to, len(source.factors), path)
