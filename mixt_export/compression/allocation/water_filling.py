"""Minimise the summed loss tails of all linears within one budget: one Lagrange multiplier, found by bisection."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence

import numpy as np

from mixt_export.compression.allocation.candidates import (
    TOLERANCE,
    Candidate,
    Ranks,
    cost,
    kept_parameters,
    tails,
    total_loss,
)
from mixt_export.compression.allocation.shares import too_small

#: Halvings of the multiplier's logarithmic interval; 1e-60 … 1e+60 shrinks below float64 resolution.
_BISECTIONS = 100
#: Ranks that matrix products like: of linears with room for so many steps, ranks are multiples of STEP …
STEP, _LEAST_STEPS = 16, 8
#: … if that raises the summed loss by no more than this share of it.
_PRICE = 0.01


def water_filling(candidates: Sequence[Candidate], keep: float, floor: float = 0.1) -> Ranks:
    """Minimise Σ tails subject to ``keep`` of the parameters, ranks at least ``floor`` · min(m, n).

    Each linear takes rank k at cost k (m + n) and loss Σ_{i>=k} loss_i, or stays dense at cost m n and loss 0. For a
    multiplier λ on cost the best choice of each linear is independent; λ is found by bisection, and what whole ranks
    leave of the budget is spent on the directions that buy most. Where the floor alone exceeds the budget, it is
    lowered in proportion. Ranks of large linears are multiples of STEP where that is free (see _PRICE). Raises
    UsageError when even rank 1 everywhere does not fit.
    """
    exact = _filled(candidates, keep, floor, {c.name: 1 for c in candidates})
    steps = {c.name: STEP if c.max_rank >= STEP * _LEAST_STEPS else 1 for c in candidates}
    if set(steps.values()) == {1}:
        return exact
    snapped = _filled(candidates, keep, floor, steps)
    free = total_loss(candidates, snapped) <= (1.0 + _PRICE) * total_loss(candidates, exact)
    return snapped if free else exact


def _filled(candidates: Sequence[Candidate], keep: float, floor: float, steps: Mapping[str, int]) -> Ranks:
    """The minimum over ranks that are multiples of ``steps``, and the rest spent."""
    whole = sum(candidate.dense_cost for candidate in candidates)
    budget = keep * whole
    floors = _floors(candidates, budget, floor, steps)
    losses = {candidate.name: tails(candidate) for candidate in candidates}

    def at(multiplier: float) -> Ranks:
        return {c.name: _cheapest(c, losses[c.name], floors[c.name], steps[c.name], multiplier) for c in candidates}

    low, high = -60.0, 60.0  # log10 of λ: at `low` all want to be dense, at `high` all are at their floor
    if kept_parameters(candidates, at(10.0**low)) <= budget:
        return at(10.0**low)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if kept_parameters(candidates, at(10.0**middle)) <= budget:
            high = middle
        else:
            low = middle
    ranks = at(10.0**high)
    _spend_rest(candidates, ranks, losses, steps, budget)
    if budget - kept_parameters(candidates, ranks) > TOLERANCE / 2 * whole:
        _spend_rest(candidates, ranks, losses, {c.name: 1 for c in candidates}, budget)
    return ranks


def _cheapest(candidate: Candidate, losses: np.ndarray, floor: int | None, step: int, multiplier: float) -> int | None:
    """argmin of loss + λ · cost over the ranks and dense."""
    if floor is None:
        return None
    ranks = np.arange(floor, candidate.max_rank + 1, step)
    prices = losses[ranks] + multiplier * candidate.unit * ranks
    best = int(np.argmin(prices))
    return int(ranks[best]) if prices[best] < multiplier * candidate.dense_cost else None


def _floors(
    candidates: Sequence[Candidate], budget: float, floor: float, steps: Mapping[str, int]
) -> dict[str, int | None]:
    """Smallest rank of each linear, a multiple of its step; None where no rank is smaller than dense."""

    def at(share: float) -> Ranks:
        return {
            c.name: min(_up(max(1, math.ceil(share * c.full_rank)), steps[c.name]), _down(c.max_rank, steps[c.name]))
            if c.max_rank
            else None
            for c in candidates
        }

    share = floor
    while share > 1e-6:
        floors = at(share)
        if kept_parameters(candidates, floors) <= budget:
            return floors
        share /= 2
    floors = {c.name: 1 if c.max_rank else None for c in candidates}
    if kept_parameters(candidates, floors) > budget:
        raise too_small(candidates, floors, budget / sum(candidate.dense_cost for candidate in candidates))
    return floors


def _up(rank: int, step: int) -> int:
    return -(-rank // step) * step


def _down(rank: int, step: int) -> int:
    return rank // step * step


def _spend_rest(
    candidates: Sequence[Candidate],
    ranks: Ranks,
    losses: Mapping[str, np.ndarray],
    steps: Mapping[str, int],
    budget: float,
) -> None:
    """Add steps of ranks, or make whole linears dense, in order of loss saved per parameter while the budget lasts."""
    left = budget - kept_parameters(candidates, ranks)
    by_name = {candidate.name: candidate for candidate in candidates}
    queue: list[tuple[float, str, int, int | None]] = []

    def offer(candidate: Candidate) -> None:
        rank = ranks[candidate.name]
        assert rank is not None
        for after in (None, rank + steps[candidate.name]):
            if after is None or after <= candidate.max_rank:
                price = cost(candidate, after) - cost(candidate, rank)
                saved = losses[candidate.name][rank] - (0.0 if after is None else losses[candidate.name][after])
                heapq.heappush(queue, (-float(saved) / price, candidate.name, rank, after))

    for candidate in candidates:
        if ranks[candidate.name] is not None:
            offer(candidate)
    while queue:
        _, name, rank, after = heapq.heappop(queue)
        candidate = by_name[name]
        if ranks[name] != rank or cost(candidate, after) - cost(candidate, rank) > left:
            continue  # another step of this linear was taken first, or it is too large for what is left
        left -= cost(candidate, after) - cost(candidate, rank)
        ranks[name] = after
        if after is not None:
            offer(candidate)
