"""A linear as the allocation rules see it, and what a choice of ranks costs. numpy only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

#: The keep that was asked for and the keep achieved may differ by this much where whole ranks allow it.
TOLERANCE = 0.005


@dataclass(frozen=True)
class Candidate:
    """One linear. ``loss``: (r,) what leaving out direction i costs, descending, in what the rule weighs (see Rule).

    ``price``: parameters of one rank; None: out + in.
    """

    name: str
    out_features: int
    in_features: int
    loss: np.ndarray
    price: int | None = None

    @property
    def dense_cost(self) -> int:
        """Parameters of the dense matrix."""
        return self.out_features * self.in_features

    @property
    def unit(self) -> int:
        """Parameters of one rank."""
        return self.out_features + self.in_features if self.price is None else self.price

    @property
    def full_rank(self) -> int:
        """min(out, in)."""
        return min(self.out_features, self.in_features)

    @property
    def max_rank(self) -> int:
        """The largest rank that is smaller than the dense matrix (0: none is)."""
        return (self.dense_cost - 1) // self.unit


#: Linear name -> rank, or None for a linear that stays dense.
Ranks = dict[str, int | None]


def cost(candidate: Candidate, rank: int | None) -> int:
    """Parameters of ``candidate`` with ``rank``."""
    return candidate.dense_cost if rank is None else rank * candidate.unit


def kept_parameters(candidates: Sequence[Candidate], ranks: Mapping[str, int | None]) -> int:
    """Parameters of the targeted linears after compression: factors, plus the dense ones."""
    return sum(cost(candidate, ranks[candidate.name]) for candidate in candidates)


def tails(candidate: Candidate) -> np.ndarray:
    """tails[k] = loss of rank k, k = 0 … full rank, float64."""
    loss = np.asarray(candidate.loss, dtype=np.float64)[: candidate.full_rank]
    return np.append(np.cumsum(loss[::-1])[::-1], 0.0)


def total_loss(candidates: Sequence[Candidate], ranks: Mapping[str, int | None]) -> float:
    """Summed loss of a choice of ranks."""
    return sum(
        float(np.asarray(candidate.loss, dtype=np.float64)[rank:].sum())
        for candidate in candidates
        if (rank := ranks[candidate.name]) is not None
    )
