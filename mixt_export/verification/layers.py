"""Error of every block's output, gathered over sequences; says which block diverges first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from mixt_export.errors import UsageError
from mixt_export.verification.metrics import token_relative_l2

#: Share of its threshold up to which a block's error is what rounding alone may make.
_FLOOR = 0.4
_GROWTH = 4.0


class LayerErrors:
    """Root mean square over tokens of each block output's relative L2 (see metrics.token_relative_l2)."""

    def __init__(self, count: int) -> None:
        self._squares = [0.0] * count
        self._tokens = 0

    def add(self, actual: Sequence[NDArray[Any]], expected: Sequence[NDArray[Any]]) -> None:
        """Take in one sequence: block outputs (seq, hidden) of both models, in order.

        Raises UsageError when their sizes differ: then the reference is another model.
        """
        tokens = len(expected[0])
        self._tokens += tokens
        for index, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
            if ours.shape != theirs.shape:
                raise UsageError(
                    f"the exported model's blocks give {ours.shape[-1]} features, the reference's {theirs.shape[-1]}; "
                    "give the model folder that was exported with --reference."
                )
            self._squares[index] += tokens * token_relative_l2(ours, theirs) ** 2

    def values(self) -> list[float]:
        """One error per block; empty when nothing was added."""
        return [math.sqrt(square / self._tokens) for square in self._squares] if self._tokens else []

    def first_beyond(self, thresholds: Sequence[float], floor: float = _FLOOR) -> int | None:
        """Index of the block that departs first, see `suspect`."""
        return suspect(self.values(), thresholds, floor)


def suspect(errors: Sequence[float], thresholds: Sequence[float], floor: float = _FLOOR) -> int | None:
    """Index of the place along the way where the error begins; None where it begins nowhere.

    Errors in units of their thresholds. Up to the first that exceeds 1 it is the place where the error grows most,
    which may come before: a small error in one block can be amplified by the next. Where none exceeds 1 it must grow at
    least fourfold. What is below ``floor`` counts as ``floor``, so that rounding is no growth.
    """
    ratios = [
        max(error / threshold, floor) if math.isfinite(error) else math.inf
        for error, threshold in zip(errors, thresholds, strict=False)
    ]
    beyond = next((index for index, ratio in enumerate(ratios) if ratio > 1.0), None)
    before = [floor, *ratios]
    growth = [
        ratio / last if math.isfinite(last) else 1.0
        for ratio, last in zip(ratios[: None if beyond is None else beyond + 1], before, strict=False)
    ]
    best = max(range(len(growth)), key=growth.__getitem__, default=None)
    return best if best is not None and (beyond is not None or growth[best] >= _GROWTH) else None
