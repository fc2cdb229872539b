"""The kernels whose text is pinned: every tensor-train kernel, and the mixtures that linears usually have."""

from __future__ import annotations

from typing import Any

from mixt_export.building.toolkit import toolkit

#: Trailing spectators of windows: pairs of four terms, three and four terms apart, three groups.
_SPECTATORS = ((2, 1), (4, 1), (8, 1), (4, 2, 1), (8, 4, 2, 1))


def catalogue() -> list[Any]:
    """Kernels (tactics.Kernel) that golden.py pins, in a fixed order."""
    tactics = toolkit("tactics")
    found = []
    widest, least = tactics.ALIGNMENTS
    found += tactics.train_kernels(False, widest)
    found += tactics.train_kernels(False, widest, odd=True)
    found += tactics.train_kernels(True, widest)[:2]
    for spectators in _SPECTATORS:
        found += [tactics.mixture_kernel(spectators, left, False, widest) for left in (False, True)]
    found.append(tactics.mixture_kernel((4, 1), False, True, least))
    return found
