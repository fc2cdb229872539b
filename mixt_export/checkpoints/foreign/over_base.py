"""Models stored as a difference to another: what the folder holds is put over its base model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mixt_export.checkpoints.checkpoint import Checkpoint
from mixt_export.checkpoints.store import StoredTensor, TensorStore
from mixt_export.errors import CheckpointError, UsageError
from mixt_export.network import FactorizedLinear

#: Environment variable with the folder of the base model; the option --base sets it, and processes inherit it.
BASE_VARIABLE = "MIXT_BASE_MODEL"
#: Adapters over adapters, at most.
_DEEPEST = 4


def given_base() -> Path | None:
    """The base model that the user named, or None."""
    given = os.environ.get(BASE_VARIABLE)
    return Path(given) if given else None


def open_base(folder: Path, named: str | None, what: str) -> Checkpoint:
    """The base model of ``folder``: the one the user gave, else the ``named`` one, if that is a folder here.

    ``named`` is a path, absolute or from ``folder`` or the working directory; names of hubs are not looked up.
    ``what`` says in a message what is stored. Raises UsageError when there is no such folder, CheckpointError where a
    base leads back to itself.
    """
    from mixt_export.checkpoints.folder import open_checkpoint  # it knows all formats, this one included

    given = given_base()
    found: Path | None = given
    if given is None and named:
        candidates = (folder / named, Path(named)) if not Path(named).is_absolute() else (Path(named),)
        found = next((path for path in candidates if _is_folder(path)), None)
    if found is None:
        told = f" (it names {named!r}, which is no folder here)" if named else ""
        raise UsageError(f"{folder}: holds {what} and needs its base model{told}; give the model's folder with --base.")
    if not found.is_dir():
        raise UsageError(f"--base {found}: there is no such folder; give the folder of the base model of {folder}.")
    home = folder.resolve()
    if found.resolve() == home:
        raise UsageError(f"--base {found}: is the folder {folder} itself; give the folder of its base model.")
    with _Nesting(folder):
        base = open_checkpoint(found)
    if home in (path.resolve() for path in base.folders):
        raise CheckpointError(f"{folder}: its base model {found} builds on this folder again; correct one of the two.")
    return base


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name of any length may stand in a file
        return False


class _Nesting:
    """Counts bases of bases; CheckpointError where there is no end. A given base counts for the outermost folder."""

    depth = 0

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._given: str | None = None

    def __enter__(self) -> None:
        if _Nesting.depth >= _DEEPEST:
            raise CheckpointError(
                f"{self._folder}: its base model has a base model, and so on, more than {_DEEPEST} deep; correct the "
                "names of base models."
            )
        _Nesting.depth += 1
        self._given = os.environ.pop(BASE_VARIABLE, None)

    def __exit__(self, *_error: object) -> None:
        _Nesting.depth -= 1
        if self._given is not None:
            os.environ[BASE_VARIABLE] = self._given


def over_base(
    folder: Path,
    name: str,
    reason: str,
    base: Checkpoint,
    tensors: Mapping[str, StoredTensor],
    factors: Mapping[str, FactorizedLinear],
    info: Mapping[str, Any],
) -> Checkpoint:
    """``base`` with ``tensors`` added or replaced and the linears of ``factors`` replaced; nothing is read.

    A linear that is factorised now loses its dense weight, unless its factors name that.
    """
    every = {**base.factors, **factors}
    used = {ref.name for linear in every.values() for ref in linear.tensors()}
    dropped = {f"{linear}.weight" for linear in factors} - used
    kept = {key: stored for key, stored in base.store.items() if key not in dropped}
    taken = {stored.path.name: stored.path for stored in kept.values() if stored.in_file}
    for key, stored in tensors.items():
        # An exported folder links files by their names: two files of one name cannot both be linked.
        clash = stored.in_file and taken.get(stored.path.name, stored.path) != stored.path
        kept[key] = replace(stored, linkable=False) if clash else stored
    return replace(
        base,
        path=folder,
        format=name,
        reason=f"{reason}, over {base.path} ({base.format})",
        store=TensorStore(kept),
        factors=every,
        info={**base.info, **info},
        bases=base.folders,
    )
