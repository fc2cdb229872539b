"""Square roots of second moments against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mixt_export.compression.roots import ROOTS, Spectral, cholesky
from mixt_export.errors import CheckpointError


def moments(features: int, tokens: int, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((features, tokens))
    return x @ x.T / tokens


@pytest.mark.parametrize("name", ["cholesky", "eigen"])
def test_a_root_is_a_root_and_is_inverted(name: str) -> None:
    gram = moments(7, 30)
    root = ROOTS[name](torch.from_numpy(gram))
    factor = root.times(torch.eye(7, dtype=torch.float64)).numpy()
    np.testing.assert_allclose(factor @ factor.T, gram, atol=1e-12)
    right = np.random.default_rng(1).standard_normal((7, 3))
    found = root.solve_transposed(torch.from_numpy(right)).numpy()
    np.testing.assert_allclose(found, np.linalg.inv(factor).T @ right, rtol=1e-10)


def test_the_diagonal_root() -> None:
    gram = np.array([4.0, 0.25, 9.0])
    root = ROOTS["diagonal"](torch.from_numpy(gram))
    left = np.arange(6.0).reshape(2, 3)
    np.testing.assert_allclose(root.times(torch.from_numpy(left)), left * [2.0, 0.5, 3.0])
    np.testing.assert_allclose(root.solve_transposed(torch.from_numpy(left.T)), left.T / [[2.0], [0.5], [3.0]])


def test_the_spectral_root_of_a_singular_matrix_is_inverted_where_it_can_be() -> None:
    gram = moments(6, 2)
    root = Spectral(torch.from_numpy(gram))
    factor = root.times(torch.eye(6, dtype=torch.float64)).numpy()
    np.testing.assert_allclose(factor @ factor.T, gram, atol=1e-12)
    inverse = root.solve_transposed(torch.eye(6, dtype=torch.float64)).numpy().T
    np.testing.assert_allclose(factor @ inverse, gram @ np.linalg.pinv(gram, hermitian=True), atol=1e-9)


def test_too_few_tokens_are_counted() -> None:
    """What damping and jitter cannot save says the rank there is and the tokens there should be."""
    broken = moments(5, 3) - 0.5 * np.diag([0.0, 0.0, 0.0, 0.0, 1.0]) * np.trace(moments(5, 3))
    rank = int((np.linalg.eigvalsh(broken) > 1e-12 * np.abs(np.linalg.eigvalsh(broken)).max()).sum())
    with pytest.raises(CheckpointError, match=rf"5 features.*rank is {rank}; calibrate on at least 5 tokens"):
        cholesky(torch.from_numpy(broken))


@pytest.mark.parametrize("name", list(ROOTS))
def test_statistics_that_are_not_finite_are_named(name: str) -> None:
    gram = torch.full((4,), float("inf")) if name == "diagonal" else torch.full((4, 4), float("nan"))
    with pytest.raises(CheckpointError, match=r"4 features are not finite.*at least 4 tokens"):
        ROOTS[name](gram)
