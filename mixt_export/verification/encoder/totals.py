"""How far two encoders' states and sentence embeddings are apart: running totals over sequences."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixt_export.verification.metrics import relative_l2, token_relative_l2


@dataclass
class Totals:
    """Running error of token states (tokens, hidden) and of sentence embeddings (sentences, hidden)."""

    tokens: int = 0
    nonfinite: int = 0
    squares: float = 0.0
    states: float = 0.0
    embedding: float = 0.0
    cosine: float = 1.0

    def add(self, actual: NDArray[Any], expected: NDArray[Any], ours: NDArray[Any], theirs: NDArray[Any]) -> None:
        """States of one sequence of both models, then their embeddings."""
        self.nonfinite += int((~np.isfinite(actual)).any(axis=-1).sum())
        self.tokens += len(expected)
        self.squares += len(expected) * token_relative_l2(actual, expected) ** 2
        self.states = max(self.states, relative_l2(actual, expected))
        self.embedding = max(self.embedding, relative_l2(ours, theirs))
        norm = float(np.linalg.norm(ours) * np.linalg.norm(theirs))
        self.cosine = min(self.cosine, float(ours @ theirs) / norm if norm > 0.0 and math.isfinite(norm) else 0.0)

    @property
    def rel_l2(self) -> float:
        """Root mean square over tokens of each token's relative L2."""
        return math.sqrt(self.squares / self.tokens) if self.tokens else math.inf

    @property
    def needed(self) -> float:
        """The tolerance that passes."""
        return max(self.rel_l2, self.embedding)


def unit_mean(states: NDArray[Any]) -> NDArray[np.float64]:
    """Mean over tokens (seq, hidden) -> (hidden,) of length 1, in float64."""
    mean: NDArray[np.float64] = states.astype(np.float64).mean(axis=0)
    norm = float(np.linalg.norm(mean))
    return mean / norm if norm > 0.0 else mean
