"""How far two sets of logits are apart. Every metric is a sum over positions, so that windows stream through."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


def relative_l2(actual: NDArray[np.floating], expected: NDArray[np.floating]) -> float:
    """‖actual − expected‖₂ / ‖expected‖₂ over all elements, in float64. NaN or Inf in either gives inf."""
    with np.errstate(invalid="ignore"):  # NaN bits of any kind
        difference = actual.astype(np.float64) - expected.astype(np.float64)
    error = math.sqrt(float(np.vdot(difference, difference)))
    scale = math.sqrt(float(np.vdot(expected.astype(np.float64), expected.astype(np.float64))))
    ratio = error / scale if scale else (0.0 if error == 0.0 else math.inf)
    return ratio if math.isfinite(ratio) else math.inf


def token_relative_l2(actual: NDArray[np.floating], expected: NDArray[np.floating]) -> float:
    """Root mean square over tokens of each token's own relative L2; arrays are (..., hidden).

    One token of huge norm (attention sinks have norms hundreds of times the others') would hide the rest in a plain
    relative L2; here every token weighs the same.
    """
    with np.errstate(invalid="ignore"):
        difference = np.linalg.norm(actual.astype(np.float64) - expected.astype(np.float64), axis=-1)
    scale = np.linalg.norm(expected.astype(np.float64), axis=-1)
    ratios = np.divide(difference, scale, out=np.where(difference == 0.0, 0.0, np.inf), where=scale > 0.0)
    mean = math.sqrt(float(np.mean(ratios**2)))
    return mean if math.isfinite(mean) else math.inf


def log_softmax(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    """Log probabilities over the last axis, in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def kl_divergence(expected: NDArray[np.floating], actual: NDArray[np.floating]) -> NDArray[np.float64]:
    """KL(expected ‖ actual) in nats of the distributions that two arrays of logits (..., vocab) stand for."""
    p, q = log_softmax(expected), log_softmax(actual)
    divergence: NDArray[np.float64] = np.sum(np.exp(p) * (p - q), axis=-1)
    return divergence


def tie_tolerances(chosen: NDArray[np.int64], expected: NDArray[np.floating]) -> NDArray[np.float64]:
    """Margin / (2·max|logits|) where the ``chosen`` token is not the top of ``expected`` (positions, vocab).

    That is the tolerance from which on LogitsComparison calls the difference a tie.
    """
    rows = np.arange(len(chosen))
    top = expected.argmax(axis=-1)
    differ = rows[chosen != top]
    values = expected[differ].astype(np.float64)
    margin = values[np.arange(len(differ)), top[differ]] - values[np.arange(len(differ)), chosen[differ]]
    scale = 2.0 * np.maximum(np.abs(values).max(axis=-1, initial=0.0), 1e-30)
    needed: NDArray[np.float64] = margin / scale
    return needed


@dataclass
class LogitsComparison:
    """Running totals over positions of ``actual`` against ``expected`` logits.

    A position whose top token differs is *tied* when the reference's own margin between the two tokens is no more
    than ``2 · tolerance · max|logits|``: an error that the tolerance allows on each of the two can turn their order.
    Every other difference is a *flip*. ``needed`` is the tolerance at which relative L2 and all flips would pass.
    """

    tolerance: float
    positions: int = 0
    nonfinite: int = 0
    max_abs: float = 0.0
    worst_position: float = 0.0
    _turns: list[float] = field(default_factory=list, repr=False)
    _error: float = field(default=0.0, repr=False)
    _scale: float = field(default=0.0, repr=False)
    _dot: float = field(default=0.0, repr=False)
    _actual: float = field(default=0.0, repr=False)
    _kl: float = field(default=0.0, repr=False)

    def add(self, actual: NDArray[np.floating], expected: NDArray[np.floating]) -> None:
        """Take in logits (positions, vocab) of both."""
        actual, expected = np.atleast_2d(actual), np.atleast_2d(expected)
        for start in range(0, len(actual), 64):  # float64 copies stay small
            self._add(actual[start : start + 64], expected[start : start + 64])

    def _add(self, actual: NDArray[np.floating], expected: NDArray[np.floating]) -> None:
        self.positions += len(actual)
        bad = ~np.isfinite(actual).all(axis=-1)
        self.nonfinite += int(bad.sum())
        good = ~bad & np.isfinite(expected).all(axis=-1)
        a, e = actual[good].astype(np.float64), expected[good].astype(np.float64)
        if not len(a):
            return
        difference = a - e
        squared, scale = np.sum(difference**2, axis=-1), np.sum(e**2, axis=-1)
        self._error += float(squared.sum())
        self._scale += float(scale.sum())
        self._dot += float(np.sum(a * e))
        self._actual += float(np.sum(a * a))
        self._kl += float(kl_divergence(e, a).sum())
        self.max_abs = max(self.max_abs, float(np.abs(difference).max()))
        ratios = np.sqrt(squared / np.where(scale > 0.0, scale, 1.0))
        self.worst_position = max(self.worst_position, float(ratios.max()))
        self._turns.extend(tie_tolerances(a.argmax(axis=-1), e).tolist())

    def flips_at(self, tolerance: float) -> int:
        """Positions whose top token differs by more than a tie at ``tolerance``."""
        return sum(turn > tolerance for turn in self._turns)

    @property
    def flips(self) -> int:
        """Positions whose top token differs by more than a tie."""
        return self.flips_at(self.tolerance)

    @property
    def ties(self) -> int:
        """Positions whose top token differs within a tie."""
        return len(self._turns) - self.flips

    @property
    def rel_l2(self) -> float:
        """Relative L2 over everything added; inf when something was not finite."""
        if self.nonfinite or not self.positions:
            return math.inf
        return math.sqrt(self._error / self._scale) if self._scale else (math.inf if self._error else 0.0)

    @property
    def cosine(self) -> float:
        """Cosine between all logits of both."""
        norm = math.sqrt(self._actual * self._scale)
        return self._dot / norm if norm and not self.nonfinite else 0.0

    @property
    def kl(self) -> float:
        """Mean KL(expected ‖ actual) per position, in nats."""
        return max(self._kl, 0.0) / self.positions if self.positions and not self.nonfinite else math.inf

    @property
    def top1(self) -> float:
        """Share of positions whose top token is the same or tied."""
        return 1.0 - (self.flips + self.nonfinite) / self.positions if self.positions else 0.0

    @property
    def needed(self) -> float:
        """The smallest tolerance that would have passed."""
        return max([self.rel_l2, *self._turns])

    def as_metrics(self) -> dict[str, float | int]:
        """Everything as a flat dict for a report."""
        return {
            "positions": self.positions,
            "rel_l2": self.rel_l2,
            "worst_position_rel_l2": self.worst_position,
            "max_abs": self.max_abs,
            "cosine": self.cosine,
            "kl": self.kl,
            "top1": self.top1,
            "flips": self.flips,
            "ties": self.ties,
            "nonfinite": self.nonfinite,
            "needed_tolerance": self.needed,
        }
