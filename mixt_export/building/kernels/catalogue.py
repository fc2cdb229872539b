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
    for dtype, aligns in tactics.ALIGNMENTS.items():
        found += tactics.train_kernels(dtype, False, aligns[0])
        found += tactics.train_kernels(dtype, False, aligns[0], odd=True)
        found += tactics.train_kernels(dtype, True, aligns[0])[:2]
        numbers = range(1, len(tactics.MIXTURE_TILES[dtype]) + 1)
        for spectators in _SPECTATORS:
            for transposed in (False, True):
                found += [
                    tactics.mixture_kernel(spectators, transposed, dtype, False, aligns[0], number)
                    for number in numbers
                ]
        found += [tactics.mixture_kernel((4, 1), False, dtype, True, aligns[-1], number) for number in numbers]
    return found
