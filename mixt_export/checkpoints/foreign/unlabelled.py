"""ALinear and BLinear where config.json does not say whose they are: the order is told from shapes, never guessed."""

from __future__ import annotations

from pathlib import Path

from mixt_export.checkpoints import huggingface
from mixt_export.checkpoints.checkpoint import Checkpoint
from mixt_export.checkpoints.foreign.names import stored_names
from mixt_export.checkpoints.foreign.order import reversed_order
from mixt_export.checkpoints.foreign.pairs import find_pairs, refuse_mixture, two_factor_linears
from mixt_export.checkpoints.weights import open_weights

NAME = "unlabelled"


def recognise(folder: Path) -> str | None:
    """Why ``folder`` is in this format, or None. Reads the headers of the weights."""
    name = next((name for name in stored_names(folder) if name.endswith((".ALinear.weight", ".BLinear.weight"))), None)
    return None if name is None else f"the tensor {name!r}, and nothing in config.json that says whose it is"


def open(folder: Path, reason: str) -> Checkpoint:
    """Open the folder; see open_checkpoint. CheckpointError where the shapes are square and do not tell the order."""
    config = huggingface.read_config(folder)
    store = open_weights(folder)
    refuse_mixture(folder, store, "ALinear/BLinear")
    pairs = find_pairs(store, "ALinear", "BLinear")
    if reversed_order(folder, config, store, pairs, None, default=None):
        pairs = {linear: pair.turned() for linear, pair in pairs.items()}
    return Checkpoint(
        folder, NAME, reason, config, store, two_factor_linears(folder, config, store, pairs, None, "low_rank")
    )
