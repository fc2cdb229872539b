"""Error of every block's output, gathered over sequences; says which block diverges first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from mixt_export.errors import UsageError
from mixt_export.verification.metrics import token_relative_l2


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

    def first_beyond(self, thresholds: Sequence[float]) -> int | None:
        """Index of the first block whose error exceeds its threshold."""
        pairs = enumerate(zip(self.values(), thresholds, strict=False))
        return next((index for index, (error, threshold) in pairs if not error <= threshold), None)
