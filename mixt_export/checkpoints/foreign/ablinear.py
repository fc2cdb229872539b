"""ABLinear (LowRankArena): `low_rank_modules` in config.json, y = ALinear(BLinear(x)).

Written by https://github.com/Zishan-Shao/lowrankarena (src/modeling/common.py): model_type `lowrank_<family>`,
`<linear>.BLinear.weight` (rank, in), `<linear>.ALinear.weight` (out, rank), the bias at ALinear.
"""

from __future__ import annotations

from pathlib import Path

from mixt_export.checkpoints.checkpoint import CONFIG_FILE, Checkpoint
from mixt_export.checkpoints.foreign import config as configs
from mixt_export.checkpoints.foreign.pairs import find_pairs, refuse_mixture, two_factor_linears
from mixt_export.checkpoints.weights import open_weights
from mixt_export.errors import UnsupportedError

NAME = "ablinear"
SCHEMA = "ABLinear"
VERSION = 1


def recognise(folder: Path) -> str | None:
    """Why ``folder`` is in this format, or None."""
    config = configs.peek(folder)
    if config.get("low_rank_modules"):
        return f"low_rank_modules in {CONFIG_FILE}"
    found = configs.model_type(config)
    return f"model_type {found!r} in {CONFIG_FILE}" if found.startswith("lowrank_") else None


def open(folder: Path, reason: str) -> Checkpoint:
    """Open the folder; see open_checkpoint. UnsupportedError for another schema or a newer version."""
    given = configs.own_config(folder, NAME)
    path = folder / CONFIG_FILE
    schema, version = given.get("low_rank_schema", SCHEMA), given.get("low_rank_format_version", VERSION)
    if schema != SCHEMA or version != VERSION:
        raise UnsupportedError(
            f"{path}: is low_rank_schema {schema!r}, version {version!r}; {SCHEMA!r}, version {VERSION} is read."
        )
    store = open_weights(folder)
    refuse_mixture(folder, store, "ALinear/BLinear")
    pairs = find_pairs(store, "ALinear", "BLinear")
    listed = given.get("low_rank_modules")
    ranks = None if listed is None else configs.ranks_of(path, "low_rank_modules", listed)
    method = given.get("low_rank_method")
    config = configs.normalised(given, NAME)
    factors = two_factor_linears(folder, config, store, pairs, ranks, method if isinstance(method, str) else NAME)
    return Checkpoint(folder, NAME, reason, config, store, factors)
