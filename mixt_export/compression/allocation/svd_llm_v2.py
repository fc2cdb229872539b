"""SVD-LLM V2's heterogeneous ratios (arXiv 2503.12340, algorithm 1): less is taken where truncation costs more.

Within each group G of one matrix type, at the wanted share removed R:

    L_i = ||W_i X - W_i' X||_F at the ratio R, over all calibration tokens;   l_i = 1 / ln L_i;
    share removed of i = |G| · R · l_i / Σ_G l.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from mixt_export.compression.allocation.candidates import Candidate, Ranks, tails
from mixt_export.compression.allocation.shares import ranks_of_shares

#: Losses below this count as this: 1 / ln L grows without bound towards L = 1 and changes sign there, which the paper
#: leaves open; its losses are in the thousands.
_LEAST_LOSS = math.e

_BISECTIONS = 60


def svd_llm_v2(candidates: Sequence[Candidate], keep: float, floor: float = 0.0) -> Ranks:
    """Ranks by the paper's formula. ``loss`` of the candidates is the squared output error over all tokens.

    A share removed above 1 is cut there; the others of the group then give more, so that every group removes R as
    the paper intends. ``floor`` is not read. Raises UsageError when rank 1 everywhere exceeds ``keep``.
    """
    groups: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        groups.setdefault(matrix_type(candidate.name), []).append(candidate)
    shares: dict[str, float] = {}
    for group in groups.values():
        shares |= _shares(group, keep)
    return ranks_of_shares(candidates, shares, keep)


def matrix_type(name: str) -> str:
    """``name`` without the numbers of layers and experts: model.layers.*.mlp.up_proj."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _shares(group: Sequence[Candidate], keep: float) -> Mapping[str, float]:
    """Share kept by each linear of one group."""
    weights = {c.name: 1.0 / math.log(max(_least_error(c, keep), _LEAST_LOSS)) for c in group}
    wanted = (1.0 - keep) * sum(c.dense_cost for c in group)

    def removed(scale: float) -> float:
        return sum(c.dense_cost * min(1.0, scale * weights[c.name]) for c in group)

    low, high = 0.0, 1.0 / min(weights.values())
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if removed(middle) < wanted else (low, middle)
    return {c.name: 1.0 - min(1.0, high * weights[c.name]) for c in group}


def _least_error(candidate: Candidate, keep: float) -> float:
    """L_min: the error of the best factors that keep ``keep`` of this linear."""
    rank = min(max(1, int(keep * candidate.dense_cost / candidate.unit)), candidate.full_rank)
    return math.sqrt(max(0.0, float(tails(candidate)[rank])))
