from __future__ import annotations

import math

import numpy as np
import pytest

from mixt_export.verification.metrics import (
    LogitsComparison,
    kl_divergence,
    log_softmax,
    relative_l2,
    tie_tolerances,
    token_relative_l2,
)

RNG = np.random.default_rng(5)


def test_relative_l2_is_the_ratio_of_norms() -> None:
    actual, expected = RNG.normal(size=(3, 7, 11)), RNG.normal(size=(3, 7, 11))
    wanted = math.sqrt(sum((a - e) ** 2 for a, e in zip(actual.flat, expected.flat, strict=True)))
    wanted /= math.sqrt(sum(e**2 for e in expected.flat))
    assert relative_l2(actual, expected) == pytest.approx(wanted, rel=1e-12)
    assert relative_l2(np.zeros(3), np.zeros(3)) == 0.0
    assert relative_l2(np.ones(3), np.zeros(3)) == math.inf
    assert relative_l2(np.array([math.nan]), np.ones(1)) == math.inf


def test_token_error_is_not_hidden_by_a_token_of_huge_norm() -> None:
    expected = np.ones((5, 16))
    expected[0] *= 1e6
    actual = expected.copy()
    actual[3] *= 1.1
    assert relative_l2(actual, expected) < 1e-6
    assert token_relative_l2(actual, expected) == pytest.approx(0.1 / math.sqrt(5), rel=1e-9)


def test_log_softmax_and_kl_against_the_definitions() -> None:
    p, q = 5 * RNG.normal(size=(4, 9)), 5 * RNG.normal(size=(4, 9))
    for row in range(4):
        ps = [math.exp(v) / sum(math.exp(w) for w in p[row]) for v in p[row]]
        qs = [math.exp(v) / sum(math.exp(w) for w in q[row]) for v in q[row]]
        assert np.exp(log_softmax(p)[row]) == pytest.approx(ps, rel=1e-12)
        assert kl_divergence(p, q)[row] == pytest.approx(
            sum(a * math.log(a / b) for a, b in zip(ps, qs, strict=True)), rel=1e-10
        )
    assert kl_divergence(p, p) == pytest.approx(np.zeros(4), abs=1e-15)
    assert np.isfinite(log_softmax(np.array([[1e4, -1e4]]))).all()


def test_comparison_streams_to_the_same_figures_as_one_pass() -> None:
    expected = RNG.normal(size=(150, 33)).astype(np.float32)
    actual = expected + 1e-3 * RNG.normal(size=expected.shape).astype(np.float32)
    whole, parts = LogitsComparison(1e-2), LogitsComparison(1e-2)
    whole.add(actual, expected)
    for start in range(0, 150, 41):
        parts.add(actual[start : start + 41], expected[start : start + 41])
    assert whole.as_metrics() == pytest.approx(parts.as_metrics())
    a, e = actual.astype(np.float64), expected.astype(np.float64)
    assert whole.positions == 150
    assert whole.rel_l2 == pytest.approx(np.linalg.norm(a - e) / np.linalg.norm(e), rel=1e-9)
    assert whole.cosine == pytest.approx((a * e).sum() / np.linalg.norm(a) / np.linalg.norm(e), rel=1e-12)
    assert whole.max_abs == pytest.approx(np.abs(a - e).max(), rel=1e-12)
    assert whole.kl == pytest.approx(kl_divergence(e, a).mean(), rel=1e-9)
    worst = max(np.linalg.norm(a[i] - e[i]) / np.linalg.norm(e[i]) for i in range(150))
    assert whole.worst_position == pytest.approx(worst, rel=1e-12)


def test_a_tie_is_a_margin_within_what_the_tolerance_allows() -> None:
    expected = np.array([[10.0, 9.99, 0.0], [10.0, 8.0, 0.0], [10.0, 8.0, 0.0]])
    actual = np.array([[9.99, 10.0, 0.0], [8.0, 10.0, 0.0], [10.0, 8.0, 0.0]])
    comparison = LogitsComparison(1e-3)  # allows 2 · 1e-3 · 10 = 0.02
    comparison.add(actual, expected)
    assert (comparison.ties, comparison.flips) == (1, 1)
    assert comparison.top1 == pytest.approx(2 / 3)
    assert comparison.flips_at(0.0999) == 1
    assert comparison.flips_at(0.1001) == 0
    assert tie_tolerances(np.array([1, 1, 0]), expected) == pytest.approx([0.0005, 0.1])
    assert comparison.needed >= 0.1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_value_that_is_not_finite_never_passes(bad: float) -> None:
    expected = np.ones((3, 4), np.float32)
    actual = expected.copy()
    actual[1, 2] = bad
    comparison = LogitsComparison(0.5)
    comparison.add(actual, expected)
    assert comparison.nonfinite == 1
    assert comparison.rel_l2 == math.inf
    assert comparison.top1 < 1.0
