"""Which of ALinear and BLinear reads the input: ABLinear's order or Dobi-SVD's, told from shapes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixt_export.checkpoints.foreign.features import features_of
from mixt_export.checkpoints.foreign.pairs import Pair, fits
from mixt_export.checkpoints.store import TensorStore
from mixt_export.errors import CheckpointError


def reversed_order(
    where: Path,
    config: Mapping[str, Any],
    store: TensorStore,
    pairs: Mapping[str, Pair],
    ranks: Mapping[str, int] | None,
    *,
    default: bool | None,
) -> bool:
    """Whether ALinear reads the input (Dobi-SVD) in this folder: one folder is written by one code, in one order.

    A linear decides by its rank and its features in config.json where these fit one order only. ``default``: the answer
    where no linear decides; None: CheckpointError then, for nothing but the square shapes could be guessed from. Also
    raises CheckpointError where two linears decide differently.
    """
    decided: dict[bool, str] = {}
    for linear, pair in pairs.items():
        orders = {turned: _fits(config, store, linear, pair, ranks, turned) for turned in (False, True)}
        if orders[False] != orders[True]:
            decided.setdefault(orders[True], linear)
    if len(decided) == 2:
        raise CheckpointError(
            f"{where}: the shapes of {decided[True]!r} say BLinear(ALinear(x)), those of {decided[False]!r} "
            "ALinear(BLinear(x)); a folder holds one format: write the model again."
        )
    if decided:
        return next(iter(decided))
    if default is None:
        linear = next(iter(pairs))
        raise CheckpointError(
            f"{where}: whether {linear!r} is ALinear(BLinear(x)) or BLinear(ALinear(x)) cannot be told from its square "
            'factors; write low_rank_schema "ABLinear" (the first) or architectures ["DobiSVDLlamaForCausalLM"] '
            "(the second) into config.json."
        )
    return default


def _fits(
    config: Mapping[str, Any],
    store: TensorStore,
    linear: str,
    pair: Pair,
    ranks: Mapping[str, int] | None,
    turned: bool,
) -> bool:
    """Whether the factors of ``linear`` fit rank and features in this order; True for one whose factors are missing."""
    chosen = pair.turned() if turned else pair
    names = f"{chosen.down}.weight", f"{chosen.up}.weight"
    if any(name not in store for name in names):
        return True
    rank = None if ranks is None else ranks.get(linear)
    return fits(store[names[0]].ref, store[names[1]].ref, rank, features_of(config, linear))
