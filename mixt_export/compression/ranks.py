"""How many directions each linear keeps: uniform, water-filled, or read from a file. numpy only."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mixt_export.errors import UsageError

#: The keep that was asked for and the keep achieved may differ by this much where whole ranks allow it.
TOLERANCE = 0.005
#: Halvings of the multiplier's logarithmic interval; 1e-60 … 1e+60 shrinks below float64 resolution.
_BISECTIONS = 100


@dataclass(frozen=True)
class Candidate:
    """One linear as the allocator sees it. ``loss``: (r,) loss of leaving out direction i, descending."""

    name: str
    out_features: int
    in_features: int
    loss: np.ndarray

    @property
    def dense_cost(self) -> int:
        """Parameters of the dense matrix."""
        return self.out_features * self.in_features

    @property
    def unit(self) -> int:
        """Parameters of one rank."""
        return self.out_features + self.in_features

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


def kept_parameters(candidates: Sequence[Candidate], ranks: Mapping[str, int | None]) -> int:
    """Parameters of the targeted linears after compression: factors, plus the dense ones."""
    return sum(_cost(candidate, ranks[candidate.name]) for candidate in candidates)


def uniform(candidates: Sequence[Candidate], keep: float) -> Ranks:
    """The same share in every linear: rank = int(keep · m · n / (m + n)), at least 1 (AA-SVD, SVD-LLM)."""
    return {
        candidate.name: max(1, int(keep * candidate.dense_cost / candidate.unit)) if candidate.max_rank else None
        for candidate in candidates
    }


def water_filling(candidates: Sequence[Candidate], keep: float, floor: float = 0.1) -> Ranks:
    """Minimise the summed loss tails subject to ``keep`` of the parameters, ranks at least ``floor`` · min(m, n).

    Each linear takes rank k at cost k (m + n) and loss Σ_{i>=k} loss_i, or stays dense at cost m n and loss 0. For a
    multiplier λ on cost the best choice of each linear is independent; λ is found by bisection, and what whole ranks
    leave of the budget is spent on the directions that buy most. Where the floor alone exceeds the budget, it is
    lowered in proportion. Raises UsageError when even rank 1 everywhere does not fit.
    """
    budget = keep * sum(candidate.dense_cost for candidate in candidates)
    floors = _floors(candidates, budget, floor)
    tails = {candidate.name: _tails(candidate) for candidate in candidates}

    def at(multiplier: float) -> Ranks:
        return {c.name: _cheapest(c, tails[c.name], floors[c.name], multiplier) for c in candidates}

    low, high = -60.0, 60.0  # log10 of λ: at `low` all want to be dense, at `high` all are at their floor
    if kept_parameters(candidates, at(10.0**low)) <= budget:
        return at(10.0**low)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if kept_parameters(candidates, at(10.0**middle)) <= budget:
            high = middle
        else:
            low = middle
    return _spend_rest(candidates, at(10.0**high), tails, budget)


def from_file(path: Path, candidates: Sequence[Candidate]) -> Ranks:
    """Ranks from a JSON object {name or regular expression: rank or "dense"}; the first key that matches counts.

    Raises UsageError when the file is not that, a rank does not fit, a linear is matched by no key or a key by no
    linear.
    """
    table = _read_table(path)
    used: set[str] = set()
    ranks: Ranks = {}
    for candidate in candidates:
        key = next((key for key in table if key == candidate.name or re.fullmatch(key, candidate.name)), None)
        if key is None:
            raise UsageError(f"{path}: no entry matches the linear {candidate.name}; add one or --exclude the linear.")
        used.add(key)
        value = table[key]
        if value == "dense":
            ranks[candidate.name] = None
        elif isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= candidate.full_rank:
            ranks[candidate.name] = value
        else:
            raise UsageError(
                f'{path}: {key!r} gives {value!r} for {candidate.name}; give "dense" or a rank from 1 to '
                f"{candidate.full_rank}."
            )
    unused = [key for key in table if key not in used]
    if unused:
        raise UsageError(f"{path}: {unused[0]!r} matches none of the targeted linears; remove or correct it.")
    return ranks


def _read_table(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(
            f"{path}: no such file; --ranks takes auto, uniform, water-filling or the path of a JSON file."
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: cannot be read as JSON ({error}).") from error
    if not isinstance(table, dict) or not table:
        raise UsageError(f"{path}: must hold a JSON object that maps linear names to ranks.")
    for key in table:
        try:
            re.compile(key)
        except re.error as error:
            raise UsageError(
                f"{path}: {key!r} is neither a linear's name nor a regular expression ({error})."
            ) from error
    return table


def _cost(candidate: Candidate, rank: int | None) -> int:
    return candidate.dense_cost if rank is None else rank * candidate.unit


def _tails(candidate: Candidate) -> np.ndarray:
    """tails[k] = loss of rank k, k = 0 … full rank."""
    loss = np.asarray(candidate.loss, dtype=np.float64)[: candidate.full_rank]
    return np.append(np.cumsum(loss[::-1])[::-1], 0.0)


def _cheapest(candidate: Candidate, tails: np.ndarray, floor: int | None, multiplier: float) -> int | None:
    """argmin of loss + λ · cost over the ranks and dense."""
    if floor is None:
        return None
    ranks = np.arange(floor, candidate.max_rank + 1)
    prices = tails[ranks] + multiplier * candidate.unit * ranks
    best = int(np.argmin(prices))
    return int(ranks[best]) if prices[best] < multiplier * candidate.dense_cost else None


def _floors(candidates: Sequence[Candidate], budget: float, floor: float) -> dict[str, int | None]:
    """Smallest rank of each linear; None where no rank is smaller than dense."""

    def at(share: float) -> dict[str, int | None]:
        return {
            c.name: min(max(1, math.ceil(share * c.full_rank)), c.max_rank) if c.max_rank else None for c in candidates
        }

    share = floor
    while share > 1e-6:
        floors = at(share)
        if kept_parameters(candidates, floors) <= budget:
            return floors
        share /= 2
    floors = at(0.0)
    least = kept_parameters(candidates, floors)
    if least > budget:
        total = sum(candidate.dense_cost for candidate in candidates)
        raise UsageError(
            f"--keep {budget / total:.4g} is too small: rank 1 everywhere keeps {least / total:.4g} of the parameters."
        )
    return floors


def _spend_rest(candidates: Sequence[Candidate], ranks: Ranks, tails: Mapping[str, np.ndarray], budget: float) -> Ranks:
    """Add single ranks, then whole dense linears, in order of loss saved per parameter while the budget lasts."""
    ranks = dict(ranks)
    left = budget - kept_parameters(candidates, ranks)
    while True:
        best: tuple[float, Candidate, int | None, int] | None = None
        for candidate in candidates:
            rank = ranks[candidate.name]
            if rank is None:
                continue
            tail = tails[candidate.name]
            steps: list[tuple[int | None, int]] = [(None, candidate.dense_cost - rank * candidate.unit)]
            if rank < candidate.max_rank:
                steps.append((rank + 1, candidate.unit))
            for step, cost in steps:
                gain = float(tail[rank] - (0.0 if step is None else tail[step])) / cost
                if cost <= left and (best is None or gain > best[0]):
                    best = (gain, candidate, step, cost)
        if best is None:
            return ranks
        _, candidate, step, cost = best
        ranks[candidate.name] = step
        left -= cost
