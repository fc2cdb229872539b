"""What an export is optimised for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mixt_export.errors import UsageError


@dataclass(frozen=True)
class Objective:
    """``weights``: rows (tokens in one run) -> weight of that regime's time, relative to that of the dense products.

    ``growth``: the share of the bytes saved by the factors that merging may give back, over all linears together, where
    no memory budget is given. ``guarded``: forms that are slower than dense by more than `SLOWER` in a regime are
    avoided where others fit.
    """

    name: str
    weights: Mapping[int, float]
    growth: float
    guarded: bool


OBJECTIVES = {
    objective.name: objective
    for objective in (
        Objective("balanced", {1: 0.3, 16: 0.3, 128: 0.4}, growth=0.5, guarded=True),
        Objective("decode", {1: 1.0}, growth=0.5, guarded=True),
        Objective("prefill", {16: 0.5, 128: 0.5}, growth=0.5, guarded=True),
        Objective("memory", {1: 0.3, 16: 0.3, 128: 0.4}, growth=0.0, guarded=False),
    )
}

SLOWER = 1.05
"""A form may take this many times as long as the dense product in any regime, where another form avoids more."""


def objective_named(name: str) -> Objective:
    """The objective ``name``; raises UsageError with the names that exist."""
    try:
        return OBJECTIVES[name]
    except KeyError:
        raise UsageError(f"--optimize-for {name}: is none of {', '.join(OBJECTIVES)}.") from None
