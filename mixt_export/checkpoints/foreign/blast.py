"""BLAST: `blast_rank` in config.json, W_ij = B_i · diag(D_ij) · C_j.

Written by https://github.com/changwoolee/BLAST (models/modeling_blast.py): model_type `blast_llama`, `target_modules`
and `indices` (of layers), `blast_rank` and `blast_num_blocks` (by type of linear or one for all); `<linear>.B`
(b1, out/b1, rank), `.C` (b2, rank, in/b2), `.D` (b1, b2, rank), `.bias`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixt_export.checkpoints.checkpoint import CONFIG_FILE, Checkpoint
from mixt_export.checkpoints.foreign import config as configs
from mixt_export.checkpoints.foreign.pairs import refuse_mixture
from mixt_export.checkpoints.store import TensorStore
from mixt_export.checkpoints.weights import open_weights
from mixt_export.errors import CheckpointError
from mixt_export.network import Branch, Core, FactorizedLinear, TensorRef

NAME = "blast"
_PARTS = ("C", "D", "B")
_AGAIN = "download or write the model again"


def recognise(folder: Path) -> str | None:
    """Why ``folder`` is in this format, or None."""
    config = configs.peek(folder)
    if config.get("blast_rank"):
        return f"blast_rank in {CONFIG_FILE}"
    found = configs.model_type(config)
    return f"model_type {found!r} in {CONFIG_FILE}" if found.startswith("blast_") else None


def open(folder: Path, reason: str) -> Checkpoint:
    """Open the folder; see open_checkpoint."""
    given = configs.own_config(folder, NAME)
    store = open_weights(folder)
    refuse_mixture(folder, store, "BLAST")
    linears = dict.fromkeys(
        name.rpartition(".")[0] for name in store if name.rpartition(".")[2] in _PARTS and "." in name
    )
    factors = {linear: _linear(folder, given, store, linear) for linear in linears}
    return Checkpoint(folder, NAME, reason, configs.normalised(given, NAME), store, factors)


def _linear(folder: Path, config: Mapping[str, Any], store: TensorStore, linear: str) -> FactorizedLinear:
    refs = {}
    for part in _PARTS:
        if f"{linear}.{part}" not in store:
            raise CheckpointError(
                f"{folder}: the linear {linear!r} lacks {linear}.{part}, which is in no weight file; {_AGAIN}."
            )
        refs[part] = store[f"{linear}.{part}"].ref
    if f"{linear}.weight" in store:
        raise CheckpointError(
            f"{folder}: {linear!r} is stored both as factors and dense ({linear}.weight); remove one of the two."
        )
    rank, rows, columns = _sizes(folder, linear, refs)
    _expect(folder, config, linear, "blast_rank", rank, rank)
    _expect(folder, config, linear, "blast_num_blocks", rows, columns)
    # As network.build.blocks.blast, around the tensors that are there.
    labels = (("j", "r", "q"), ("b", "j", "r"), ("b", "p", "r"))
    cores = tuple(Core(refs[part], axes) for part, axes in zip(_PARTS, labels, strict=True))
    inputs = (("j", columns), ("q", refs["C"].shape[2]))
    outputs = (("b", rows), ("p", refs["B"].shape[1]))
    branch = Branch(inputs, outputs, cores)
    bias = store.refs.get(f"{linear}.bias")
    return FactorizedLinear(linear, branch.in_size, branch.out_size, (branch,), bias, NAME)


def _sizes(folder: Path, linear: str, refs: Mapping[str, TensorRef]) -> tuple[int, int, int]:
    """Rank, blocks of rows, blocks of columns. CheckpointError where the three factors do not agree."""
    b, c, d = (refs[part].shape for part in "BCD")
    if len(b) != 3 or len(c) != 3 or len(d) != 3 or d != (b[0], c[0], b[2]) or c[1] != b[2]:
        raise CheckpointError(
            f"{folder}: the factors of {linear!r} have shapes B {b}, C {c}, D {d}, which do not fit (b1, out/b1, "
            f"rank), (b2, rank, in/b2), (b1, b2, rank); {_AGAIN}."
        )
    return d[2], d[0], d[1]


def _expect(folder: Path, config: Mapping[str, Any], linear: str, key: str, *found: int) -> None:
    """Raise CheckpointError where config.json gives numbers for ``linear`` under ``key`` that are not ``found``."""
    given = config.get(key)
    if isinstance(given, Mapping):
        given = next((value for name, value in given.items() if name in linear), None)
    while isinstance(given, list) and len(given) == 1:
        given = given[0]
    wanted = tuple(given) if isinstance(given, list) else (given,) * len(found)
    if all(type(value) is int for value in wanted) and wanted != found:
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: {key} of {linear!r} is {given!r}, its factors say "
            f"{' × '.join(map(str, dict.fromkeys(found)))}; {_AGAIN}."
        )
