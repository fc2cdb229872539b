"""Dobi-SVD: the same names as ABLinear in the reversed order, y = BLinear(ALinear(x)).

Written by LowRankArena's exporter of https://github.com/wangqinsi1/Dobi-SVD (modules/module.py, SVDTransformLayer):
architectures DobiSVDLlamaForCausalLM, model_type unchanged, `dobi_target_modules` {linear: rank},
`<linear>.ALinear.weight` (rank, in), `<linear>.BLinear.weight` (out, rank); other linears stay dense.
"""

from __future__ import annotations

from pathlib import Path

from mixt_export.checkpoints.checkpoint import CONFIG_FILE, Checkpoint
from mixt_export.checkpoints.foreign import config as configs
from mixt_export.checkpoints.foreign.order import reversed_order
from mixt_export.checkpoints.foreign.pairs import find_pairs, refuse_mixture, two_factor_linears
from mixt_export.checkpoints.weights import open_weights

NAME = "dobi-svd"


def recognise(folder: Path) -> str | None:
    """Why ``folder`` is in this format, or None."""
    config = configs.peek(folder)
    if config.get("dobi_target_modules"):
        return f"dobi_target_modules in {CONFIG_FILE}"
    return f"a class DobiSVD… in {CONFIG_FILE}" if configs.names_class(config, "DobiSVD") else None


def open(folder: Path, reason: str) -> Checkpoint:
    """Open the folder; see open_checkpoint. The order is that of the shapes, Dobi-SVD's where they fit both."""
    given = configs.own_config(folder, NAME)
    store = open_weights(folder)
    refuse_mixture(folder, store, "ALinear/BLinear")
    listed = given.get("dobi_target_modules")
    ranks = None if listed is None else configs.ranks_of(folder / CONFIG_FILE, "dobi_target_modules", listed)
    config = configs.normalised(given, NAME)
    pairs = find_pairs(store, "ALinear", "BLinear")
    if reversed_order(folder, config, store, pairs, ranks, default=True):
        pairs = {linear: pair.turned() for linear, pair in pairs.items()}
    return Checkpoint(
        folder, NAME, reason, config, store, two_factor_linears(folder, config, store, pairs, ranks, NAME)
    )
