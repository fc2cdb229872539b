"""The same share in every linear: rank = keep · m n / (m + n), as SVD-LLM (arXiv 2403.07378) and AA-SVD do."""

from __future__ import annotations

from collections.abc import Sequence

from mixt_export.compression.allocation.candidates import Candidate, Ranks
from mixt_export.compression.allocation.shares import ranks_of_shares


def uniform(candidates: Sequence[Candidate], keep: float, floor: float = 0.0) -> Ranks:
    """Ranks of equal shares; those of linears that cannot be factorised are paid by the others. ``floor`` is not read.

    Raises UsageError when rank 1 everywhere exceeds ``keep``.
    """
    factored = sum(c.dense_cost for c in candidates if c.max_rank)
    whole = sum(c.dense_cost for c in candidates)
    share = (keep * whole - (whole - factored)) / factored if factored else 1.0
    return ranks_of_shares(candidates, {c.name: share for c in candidates}, keep)
