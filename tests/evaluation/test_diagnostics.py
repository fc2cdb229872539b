"""The paper's diagnostics against plain loops over made-up data."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mixt_export.evaluation.diagnostics import (
    drift,
    drift_by_layer,
    entropy,
    layer_similarity,
    mean_over_pairs,
    output_entropy,
    prediction_entropy,
)

rng = np.random.default_rng(11)


def test_entropies() -> None:
    p = rng.dirichlet(np.ones(4), size=7)
    wanted = [-sum(value * math.log(value) for value in row) for row in p.tolist()]
    np.testing.assert_allclose(entropy(p), wanted, rtol=1e-14)
    assert output_entropy(p) == pytest.approx(sum(wanted) / 7 / math.log(4), rel=1e-14)
    assert output_entropy(np.full((3, 4), 0.25)) == pytest.approx(1.0)
    assert output_entropy(np.eye(4)) == 0.0


def test_prediction_entropy_is_that_of_the_label_counts() -> None:
    labels = np.array([0, 0, 0, 1, 3, 3])
    shares = [3 / 6, 1 / 6, 2 / 6]
    assert prediction_entropy(labels, 4) == pytest.approx(-sum(s * math.log(s) for s in shares) / math.log(4))
    assert prediction_entropy(np.arange(8) % 4, 4) == pytest.approx(1.0)
    always = prediction_entropy(np.full(9, 2), 4)
    assert always == 0.0
    assert math.copysign(1.0, always) == 1.0


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(sum(a * b) / math.sqrt(sum(a * a) * sum(b * b)))


def test_similarity_and_drift() -> None:
    states, other = rng.standard_normal((2, 5, 4, 9)).astype(np.float32)
    wanted = np.array(
        [
            [np.mean([cosine(q[i].astype(float), q[j].astype(float)) for q in states]) for j in range(4)]
            for i in range(4)
        ]
    )
    similarity, original = layer_similarity(states), layer_similarity(other)
    np.testing.assert_allclose(similarity, wanted, atol=1e-12)
    np.testing.assert_allclose(layer_similarity(states * 7.5), similarity, atol=1e-6)
    pairs = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    assert mean_over_pairs(similarity) == pytest.approx(np.mean([wanted[pair] for pair in pairs]))
    assert drift(similarity, original) == pytest.approx(
        np.mean([abs(similarity[pair] - original[pair]) for pair in pairs])
    )
    for layer, value in enumerate(drift_by_layer(similarity, original), 1):
        assert value == pytest.approx(np.mean([abs(similarity[i, layer] - original[i, layer]) for i in range(layer)]))
    assert drift(similarity, similarity) == 0.0


def test_only_later_layers_drift_when_only_they_change() -> None:
    before = rng.standard_normal((6, 5, 8))
    after = before.copy()
    after[:, 3:] = rng.standard_normal((6, 2, 8))
    changed = drift_by_layer(layer_similarity(after), layer_similarity(before))
    assert (changed[:2] == 0.0).all()
    assert (changed[2:] > 1e-3).all()


def test_a_state_of_zeros_is_similar_to_nothing() -> None:
    states = np.ones((2, 3, 4))
    states[:, 1] = 0.0
    np.testing.assert_allclose(layer_similarity(states), [[1, 0, 1], [0, 0, 0], [1, 0, 1]], atol=1e-15)


def test_what_is_not_a_number_stays_none() -> None:
    """A model whose logits are NaN is not certain, and its layers are not orthogonal."""
    assert math.isnan(output_entropy(np.array([[0.25] * 4, [np.nan] * 4])))
    states = rng.standard_normal((3, 4, 5))
    states[1, 2] = np.nan
    similarity = layer_similarity(states)
    assert np.isnan(similarity[2]).all()
    assert np.isfinite(similarity[0, 1])
