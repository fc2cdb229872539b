"""Where a figure starts to get worse faster: a two-segment line against one line and against smooth curves.

The model is y = a + b x + c · max(0, x − x₀): continuous, slope b up to x₀ and b + c after it. Whether the bend is real
is decided by what chance and smooth curvature can do, not by eye (see find_transition).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

#: Two-segment lines have four parameters; with fewer points than this nothing can be said against noise.
LEAST_POINTS = 6
#: Largest share of straight lines with noise that would bend as clearly by chance.
SIGNIFICANCE = 0.01
#: The slope after the bend must be so many times that before it.
STEEPER = 2.0

_GRID = 400
_DRAWS = 4000
#: 95 % quantile of chi-squared with one degree of freedom: the width of a profile likelihood interval.
_CHI2 = 3.841458820694124
#: Rates of the exponentials a + b exp(rate · x), x scaled to 0 … 1, that stand for smooth growth and saturation.
_RATES = np.concatenate([-np.geomspace(0.25, 32.0, 60), np.geomspace(0.25, 32.0, 60)])
#: Exponents of the powers a + b x^exponent that do the same.
_EXPONENTS = np.geomspace(0.2, 8.0, 80)
#: Residuals below this share of the total variation are rounding.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Transition:
    """The best bend of a curve, and whether it is a transition.

    ``location``: x₀ of the best two-segment line, with its 95 % profile likelihood interval ``low`` to ``high``.
    ``slope_before`` and ``slope_after``: per unit of x. ``r2`` of the two segments, ``r2_line`` of one line,
    ``r2_smooth`` of the best smooth curve. ``p_line``: share of straight lines with Gaussian noise, at the same x,
    whose two-segment fit improves as much. ``clear``: whether it is a transition; ``statement`` says it in a sentence.
    All but ``clear`` and ``statement`` are None where there are too few points.
    """

    clear: bool
    statement: str
    location: float | None = None
    low: float | None = None
    high: float | None = None
    slope_before: float | None = None
    slope_after: float | None = None
    r2: float | None = None
    r2_line: float | None = None
    r2_smooth: float | None = None
    p_line: float | None = None


def find_transition(x: Sequence[float], y: Sequence[float], *, worse: int = 1, seed: int = 0) -> Transition:
    """The transition of ``y`` over ``x`` (distinct, increasing), or the reason why there is none.

    ``worse``: 1 when ``y`` grows as things get worse (perplexity), -1 when it falls (accuracy). Points whose ``y`` is
    not finite are left out. x₀ runs over a fine grid between the second and the last but one x, so that both segments
    have two points. It is called a transition only when all hold:
    1. fewer than SIGNIFICANCE of random straight lines with noise improve as much by a bend (Monte Carlo of the
       F statistic, whose distribution does not depend on line or noise level);
    2. the two segments (4 parameters) fit better by the Bayesian information criterion than a parabola, any
       exponential a + b exp(c x) and any power a + b x^c (3 parameters each): smooth curvature is no transition;
    3. after x₀ ``y`` moves to the worse, and at least STEEPER times as fast as before x₀ in either direction: a curve
       that levels off has none.
    """
    xs, ys = np.asarray(x, np.float64), np.asarray(y, np.float64)
    keep = np.isfinite(ys)
    xs, ys = xs[keep], ys[keep]
    if len(xs) < LEAST_POINTS:
        return Transition(False, f"no statement: {len(xs)} points, and {LEAST_POINTS} are needed")
    total = float(((ys - ys.mean()) ** 2).sum())
    if total <= _ROUNDING * max(float((ys**2).sum()), 1e-300):
        return Transition(False, "no transition: the figure does not change")
    bends = _bends(tuple(xs.tolist()))
    line, two, best, profile = bends.fit(ys)
    floor = _ROUNDING * total
    smooth = _smooth_residual(xs, ys)
    before, after = _slopes(xs, ys, bends.grid[best])
    inside = bends.grid[len(xs) * np.log(np.maximum(profile, floor) / max(two, floor)) <= _CHI2]
    found = {
        "location": float(bends.grid[best]),
        "low": float(inside.min()),
        "high": float(inside.max()),
        "slope_before": before,
        "slope_after": after,
        "r2": 1 - two / total,
        "r2_line": 1 - line / total,
        "r2_smooth": 1 - smooth / total,
        "p_line": bends.chance(line, two, floor, seed),
    }
    reason = _reason(found, len(xs), max(two, floor), max(smooth, floor), worse)
    where = f"x = {found['location']:.1f} ({found['low']:.1f} to {found['high']:.1f})"
    slopes = f"slope {before:.3g} before, {after:.3g} after, R² {found['r2']:.3f}"
    if reason is None:
        return Transition(True, f"transition at {where}: {slopes}", **found)
    return Transition(False, f"no clear transition: {reason} (best bend at {where}: {slopes})", **found)


def _reason(found: dict[str, float], points: int, two: float, smooth: float, worse: int) -> str | None:
    """Why this bend is no transition, or None."""
    if found["p_line"] >= SIGNIFICANCE:
        return f"a straight line with noise bends as much in {found['p_line']:.0%} of cases"
    if points * math.log(smooth / two) < math.log(points):
        return "a smooth curve fits as well"
    before, after = found["slope_before"], found["slope_after"]
    if worse * after < STEEPER * abs(before):
        return "it does not get worse much faster after the bend"
    return None


class _Bends:
    """Two-segment lines at fixed ``x`` for every bend of a grid, all at once."""

    def __init__(self, x: Floats) -> None:
        self.grid = np.linspace(x[1], x[-2], _GRID + 1)
        self._line, _ = np.linalg.qr(np.stack([np.ones_like(x), x - x.mean()], axis=1))
        hinges = np.maximum(0.0, x[None, :] - self.grid[:, None])
        hinges -= (hinges @ self._line) @ self._line.T
        self._hinges = hinges / np.linalg.norm(hinges, axis=1, keepdims=True)
        self._removed: dict[int, Floats] = {}

    def fit(self, y: Floats) -> tuple[float, float, int, Floats]:
        """Squared residual of the line and of the best bend, the bend's number, the residual of every bend."""
        rest = y - self._line @ (self._line.T @ y)
        line = float(rest @ rest)
        profile = np.maximum(line - (self._hinges @ rest) ** 2, 0.0)
        best = int(profile.argmin())
        return line, float(profile[best]), best, profile

    def chance(self, line: float, two: float, floor: float, seed: int) -> float:
        """Share of straight lines with noise whose best bend takes away as large a share of the residual."""
        if seed not in self._removed:
            noise = np.random.default_rng(seed).standard_normal((_DRAWS, self._line.shape[0]))
            noise -= (noise @ self._line) @ self._line.T
            self._removed[seed] = ((noise @ self._hinges.T) ** 2).max(axis=1) / (noise**2).sum(axis=1)
        observed = 1 - two / line if line > floor else 0.0
        return float((1 + (self._removed[seed] >= observed).sum()) / (1 + _DRAWS))


@functools.lru_cache(maxsize=8)
def _bends(x: tuple[float, ...]) -> _Bends:
    """Several figures of a sweep share their x, and with them what chance does."""
    return _Bends(np.array(x))


def _smooth_residual(x: Floats, y: Floats) -> float:
    """Least squared residual of a parabola, of exponentials and of powers."""
    scaled = (x - x[0]) / (x[-1] - x[0])
    shapes = [np.stack([scaled, scaled**2], axis=1)]
    shapes += [np.expm1(rate * scaled)[:, None] for rate in _RATES]
    shapes += [(scaled**exponent)[:, None] for exponent in _EXPONENTS]
    return min(_residual(np.column_stack([np.ones_like(x), shape]), y) for shape in shapes)


def _residual(design: Floats, y: Floats) -> float:
    solution, *_ = np.linalg.lstsq(design, y, rcond=None)
    rest = y - design @ solution
    return float(rest @ rest)


def _slopes(x: Floats, y: Floats, bend: float) -> tuple[float, float]:
    design = np.stack([np.ones_like(x), x, np.maximum(0.0, x - bend)], axis=1)
    (_, before, change), *_ = np.linalg.lstsq(design, y, rcond=None)
    return float(before), float(before + change)
