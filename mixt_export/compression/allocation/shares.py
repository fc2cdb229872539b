"""From the share that every linear shall keep to whole ranks that meet the budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mixt_export.compression.allocation.candidates import Candidate, Ranks, cost, kept_parameters
from mixt_export.errors import UsageError


def ranks_of_shares(candidates: Sequence[Candidate], shares: Mapping[str, float], keep: float) -> Ranks:
    """rank = share · m n / (m + n), rounded so that ``keep`` of all parameters are met from below.

    Each rank is rounded down, at least 1; what that leaves of the budget goes, rank by rank, to the linears that
    rounding took most from, so that less than one rank of the smallest unit is left where any is factorised. A linear
    with a share of 1 or more, or with no rank smaller than dense, stays dense. Raises UsageError when rank 1 does not
    fit.
    """
    budget = keep * sum(candidate.dense_cost for candidate in candidates)
    wanted = {c.name: shares[c.name] * c.dense_cost / c.unit for c in candidates}
    ranks: Ranks = {
        c.name: None if not c.max_rank or shares[c.name] >= 1.0 else min(max(1, int(wanted[c.name])), c.max_rank)
        for c in candidates
    }
    left = budget - kept_parameters(candidates, ranks)
    by_excess = sorted(candidates, key=lambda c: (ranks[c.name] or 0) - wanted[c.name], reverse=True)
    for candidate in by_excess:  # rank 1 is more than some shares, and dense linears may cost more than theirs
        rank = ranks[candidate.name]
        while left < 0 and rank is not None and rank > 1:
            rank -= 1
            left += candidate.unit
        ranks[candidate.name] = rank
    if left < 0:
        raise too_small(candidates, ranks, keep)
    _spend(candidates, ranks, wanted, left)
    return ranks


def too_small(candidates: Sequence[Candidate], ranks: Ranks, keep: float) -> UsageError:
    """The error of a budget that the least ``ranks`` exceed."""
    total = sum(candidate.dense_cost for candidate in candidates)
    least = kept_parameters(candidates, ranks) / total
    return UsageError(f"--keep {keep:.4g} is too small: rank 1 everywhere keeps {least:.4g} of the parameters.")


def _spend(candidates: Sequence[Candidate], ranks: Ranks, wanted: Mapping[str, float], left: float) -> None:
    """Add ranks where most is missing, in turns, while the budget lasts; behind the last rank a linear is dense."""
    open_ones = [c for c in candidates if ranks[c.name] is not None]
    while open_ones:
        open_ones.sort(key=lambda c: wanted[c.name] - (ranks[c.name] or 0), reverse=True)
        remaining = []
        for candidate in open_ones:
            rank = ranks[candidate.name]
            assert rank is not None
            after = rank + 1 if rank < candidate.max_rank else None
            price = cost(candidate, after) - cost(candidate, rank)
            if price > left:
                continue
            ranks[candidate.name] = after
            left -= price
            if after is not None:
                remaining.append(candidate)
        open_ones = remaining
