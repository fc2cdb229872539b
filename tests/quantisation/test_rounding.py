"""Nearest and calibrated rounding against exhaustive search and the loss they are to lower."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from mixt_export.quantisation import dequantised, nearest
from mixt_export.quantisation.blocks import distance
from mixt_export.quantisation.calibrated import calibrated


def inputs(columns: int, tokens: int = 400, seed: int = 0) -> NDArray[np.float64]:
    """Correlated, as activations are: a quarter as many causes as inputs, and noise."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((-(-columns // 4), columns)) * rng.lognormal(0, 1, columns)
    causes: NDArray[np.float64] = rng.standard_normal((tokens, len(mixing))) @ mixing
    return causes + 0.2 * rng.standard_normal(causes.shape)


def loss(matrix: NDArray[np.float64], found: NDArray[np.float32], x: NDArray[np.float64]) -> float:
    return float(np.linalg.norm(x @ (found - matrix).T) / np.linalg.norm(x @ matrix.T))


@pytest.mark.parametrize(("bits", "group", "columns"), [(4, 16, 48), (4, 32, 45), (8, 32, 96), (8, 16, 17)])
def test_nearest_is_within_half_a_step_where_nothing_is_cut_off(bits: int, group: int, columns: int) -> None:
    matrix = np.random.default_rng(3).standard_normal((5, columns))
    made = nearest(matrix, bits, group)
    values = dequantised(made)
    scale = np.abs(np.repeat(made.scales, group, axis=1)[:, :columns])
    cut = np.isin(made.codes, (0, (1 << bits) - 1))
    assert np.all((np.abs(values - matrix) <= 0.5001 * scale) | cut)
    assert distance(made, matrix)["error"] < (0.12 if bits == 4 else 0.008)


def test_nearest_picks_a_scale_at_least_as_good_as_the_largest_element_gives() -> None:
    matrix = np.random.default_rng(4).standard_t(3, (8, 64))
    made = dequantised(nearest(matrix, 4, 32))
    blocks = matrix.reshape(8, 2, 32)
    plain_scale = np.abs(blocks).max(-1, keepdims=True) / 7
    plain = (np.rint(blocks / plain_scale) * plain_scale).reshape(8, 64)
    assert np.linalg.norm(made - matrix) < np.linalg.norm(plain - matrix)


def test_a_block_of_zeros_stays_zero() -> None:
    matrix = np.zeros((2, 32))
    matrix[1, 16:] = 1.0
    for made in (nearest(matrix, 4, 16), calibrated(matrix, np.eye(32), 4, 16)):
        values = dequantised(made)
        assert np.isfinite(values).all()
        assert not values[0].any()
        assert np.allclose(values[1, 16:], 1.0, atol=0.01)


@pytest.mark.parametrize(("rows", "columns", "group"), [(12, 64, 32), (7, 45, 16), (5, 96, 32)])
def test_calibration_loses_less_on_tokens_it_has_not_seen(rows: int, columns: int, group: int) -> None:
    x = inputs(columns, 800)
    seen, unseen = x[:400], x[400:]
    matrix = np.random.default_rng(5).standard_normal((rows, columns))
    ours = dequantised(calibrated(matrix, seen.T @ seen, 4, group))
    plain = dequantised(nearest(matrix, 4, group))
    assert loss(matrix, ours, unseen) < 0.7 * loss(matrix, plain, unseen)


def test_calibration_finds_what_trying_all_codes_finds() -> None:
    """Five inputs, the scale that was chosen: no other codes lose much less."""
    x = inputs(5, 200, seed=7)
    gram = x.T @ x
    matrix = np.random.default_rng(8).standard_normal((1, 5))
    made = calibrated(matrix, gram, 4, 16, damping=1e-6)
    scale = float(made.scales[0, 0])
    near = np.rint(matrix[0] / scale)
    choices = [range(int(max(-8, n - 3)), int(min(7, n + 3)) + 1) for n in near]
    best = min(
        (np.array(codes) * scale - matrix[0]) @ gram @ (np.array(codes) * scale - matrix[0])
        for codes in itertools.product(*choices)
    )
    error = dequantised(made)[0] - matrix[0]
    assert error @ gram @ error <= 1.6 * best


def test_calibration_repeats_itself() -> None:
    x = inputs(48)
    matrix = np.random.default_rng(9).standard_normal((6, 48))
    first, second = (calibrated(matrix, x.T @ x, 4, 16) for _ in range(2))
    assert np.array_equal(first.codes, second.codes)
    assert np.array_equal(first.scales, second.scales)


def test_inputs_that_were_never_seen_count_for_something() -> None:
    matrix = np.random.default_rng(10).standard_normal((4, 32))
    for gram in (np.zeros((32, 32)), np.diag([1.0] * 16 + [0.0] * 16)):
        assert distance(calibrated(matrix, gram, 4, 16), matrix)["error"] < 0.15
