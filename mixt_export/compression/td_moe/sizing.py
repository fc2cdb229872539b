"""Ranks of a stack of experts: multiples of 8 that keep the share of parameters asked for at the least cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixt_export.errors import UsageError

#: Ranks are multiples of this, which products on GPUs want.
MULTIPLE = 8

#: How far from the share asked for a choice may be, relative to it, where ranks allow.
CLOSE = 0.005


@dataclass(frozen=True)
class Stack:
    """``experts`` matrices (``out_features``, ``in_features``) decomposed together; ``name`` is for messages."""

    name: str
    experts: int
    out_features: int
    in_features: int

    @property
    def dense(self) -> int:
        """Parameters as they are."""
        return self.experts * self.out_features * self.in_features

    def parameters(self, r_in: int, r_out: int) -> int:
        """Parameters of the factors: cores and the two shared factors."""
        return self.experts * r_in * r_out + self.in_features * r_in + self.out_features * r_out

    def candidates(self, keep: float) -> Iterator[tuple[int, int]]:
        """For each r_in the two r_out around the share ``keep``, multiples of `MULTIPLE`."""
        budget, most = keep * self.dense, self.out_features // MULTIPLE * MULTIPLE
        for r_in in range(MULTIPLE, self.in_features + 1, MULTIPLE):
            room = (budget - self.in_features * r_in) / (self.experts * r_in + self.out_features)
            below = int(room // MULTIPLE) * MULTIPLE
            for r_out in (below, below + MULTIPLE):
                if MULTIPLE <= r_out <= most:
                    yield r_in, r_out

    def check(self, keep: float) -> None:
        """Raise UsageError where the features are too few for a rank, or no ranks keep as little as ``keep``."""
        if min(self.out_features, self.in_features) < MULTIPLE:
            raise UsageError(
                f"{self.name}: experts of {self.in_features} to {self.out_features} features have no ranks that are "
                f"multiples of {MULTIPLE}; leave them dense with --exclude."
            )
        least = self.parameters(MULTIPLE, MULTIPLE) / self.dense
        if keep * (1 + CLOSE) < least:
            raise UsageError(
                f"--keep {keep:g}: {self.name} keeps at least {least:.3g} of its parameters (ranks {MULTIPLE}, "
                f"{MULTIPLE}); raise it."
            )


def choose(
    stack: Stack, keep: float, in_values: NDArray[np.float64], out_values: NDArray[np.float64]
) -> tuple[int, int]:
    """(r_in, r_out): of those within `CLOSE` of ``keep`` the cheapest, else the nearest to it.

    ``in_values`` and ``out_values``: eigenvalues of both sides, descending; dropped ones cost their sum.
    """
    tails = [np.concatenate([np.cumsum(values[::-1])[::-1], [0.0]]) for values in (in_values, out_values)]
    budget = keep * stack.dense

    def distance(ranks: tuple[int, int]) -> float:
        return abs(stack.parameters(*ranks) - budget) / budget

    def cost(ranks: tuple[int, int]) -> float:
        return float(tails[0][ranks[0]] + tails[1][ranks[1]])

    candidates = list(stack.candidates(keep))
    if not candidates:  # the share is beyond what the largest multiples hold
        return stack.in_features // MULTIPLE * MULTIPLE, stack.out_features // MULTIPLE * MULTIPLE
    close = [ranks for ranks in candidates if distance(ranks) <= CLOSE]
    return min(close, key=cost) if close else min(candidates, key=lambda ranks: (distance(ranks), cost(ranks)))
