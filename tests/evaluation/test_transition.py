"""Planted transitions are recovered; curves without one are said to have none."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from mixt_export.evaluation.transition import LEAST_POINTS, find_transition

EVEN, DOUBLING = np.arange(0.0, 31.0, 2.0), np.array([0.0, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0])


@pytest.mark.parametrize("x", [EVEN, DOUBLING], ids=["even", "doubling"])
@pytest.mark.parametrize("worse", [1, -1])
@pytest.mark.parametrize("bend", [6.0, 11.0])
def test_a_planted_transition_is_recovered(x: np.ndarray, worse: int, bend: float) -> None:
    rng = np.random.default_rng(5)
    y = 3.0 + worse * (0.02 * x + 0.3 * np.maximum(0.0, x - bend)) + 0.01 * rng.standard_normal(len(x))
    found = find_transition(x.tolist(), y.tolist(), worse=worse)
    assert found.clear, found.statement
    assert found.location == pytest.approx(bend, abs=0.4)
    assert found.low <= found.location <= found.high
    assert found.slope_before == pytest.approx(worse * 0.02, abs=0.01)
    assert found.slope_after == pytest.approx(worse * 0.32, abs=0.01)
    assert found.r2 > 0.99
    assert found.p_line < 0.01
    assert "transition at" in found.statement


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(6)
    y = 0.02 * EVEN + 0.3 * np.maximum(0.0, EVEN - 11.0)
    inside = 0
    for _ in range(60):
        found = find_transition(EVEN, y + 0.3 * rng.standard_normal(len(EVEN)))
        inside += found.low <= 11.0 <= found.high
    assert inside >= 48  # 95 % in the limit of many points; 16 are few


SMOOTH: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "line": lambda x: 1.0 + 0.3 * x,
    "parabola": lambda x: x**2,
    "cube": lambda x: x**3,
    "exponential": lambda x: np.exp(x / 10),
    "root": np.sqrt,
    "saturation": lambda x: 1 - np.exp(-x / 6),
}


@pytest.mark.parametrize("x", [EVEN, DOUBLING], ids=["even", "doubling"])
@pytest.mark.parametrize("shape", SMOOTH)
def test_smooth_curves_have_none(x: np.ndarray, shape: str) -> None:
    found = find_transition(x, SMOOTH[shape](x))
    assert not found.clear, found.statement
    assert found.statement.startswith("no clear transition: ")


def test_lines_with_noise_have_one_as_rarely_as_the_significance_says() -> None:
    rng = np.random.default_rng(7)
    for x in (EVEN, DOUBLING):
        clear = sum(find_transition(x, 0.1 * x + rng.standard_normal(len(x))).clear for _ in range(100))
        assert clear <= 3


def test_a_curve_that_levels_off_or_improves_has_none() -> None:
    noise = 0.01 * np.random.default_rng(8).standard_normal(len(EVEN))
    levels_off = np.minimum(EVEN, 11.0) + noise
    assert "does not get worse much faster" in find_transition(EVEN, levels_off).statement
    falls = -np.maximum(0.0, EVEN - 11.0) + noise
    assert not find_transition(EVEN, falls, worse=1).clear
    assert find_transition(EVEN, falls, worse=-1).clear


def test_nothing_is_said_without_points_or_change() -> None:
    short = find_transition(range(LEAST_POINTS - 1), range(LEAST_POINTS - 1))
    assert (short.clear, short.location) == (False, None)
    assert f"{LEAST_POINTS} are needed" in short.statement
    assert find_transition(range(9), [2.0] * 9).statement == "no transition: the figure does not change"
    holes = [float("nan")] * 4 + [0.0, 1.0, 2.0, 3.0]
    assert "4 points" in find_transition(range(8), holes).statement


def test_equal_data_give_equal_answers() -> None:
    y = np.random.default_rng(9).standard_normal(len(EVEN))
    assert find_transition(EVEN, y) == find_transition(EVEN, y)
    scaled = find_transition(EVEN, 1e6 * y + 5.0)
    assert scaled.location == find_transition(EVEN, y).location
    assert scaled.p_line == find_transition(EVEN, y).p_line
