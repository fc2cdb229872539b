"""The closed forms of the low rank methods against the formulas of their papers, in numpy float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mixt_export.compression.closed_form import (
    activation_metric,
    anchored_target,
    damped,
    decompose,
    quadratic_error,
    updated,
)

SHAPES = [(7, 11), (11, 7), (6, 6)]
RANK = 3


def problem(shape: tuple[int, int], seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weight (out, in), inputs X and X' (in, tokens) with columns of very different sizes."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal(shape)
    x = np.exp(rng.standard_normal((shape[1], 1))) * rng.standard_normal((shape[1], 60))
    x += 0.3 * rng.standard_normal((shape[1], shape[1])) @ x
    return weight, x, x + 0.2 * rng.standard_normal(x.shape)


def truncated(matrix: np.ndarray, rank: int = RANK) -> np.ndarray:
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    kept: np.ndarray = (u[:, :rank] * s[:rank]) @ v[:rank]
    return kept


def product(weight: np.ndarray, gram: np.ndarray | None, metric: np.ndarray | None = None, root: str = "cholesky"):  # type: ignore[no-untyped-def]
    given = [None if matrix is None else torch.from_numpy(matrix) for matrix in (gram, metric)]
    found = decompose(torch.from_numpy(weight), given[0], given[1], RANK, root=root)
    return (found.up @ found.down).numpy()


@pytest.mark.parametrize("shape", SHAPES)
def test_plain_svd_is_numpys(shape: tuple[int, int]) -> None:
    weight, _, _ = problem(shape)
    np.testing.assert_allclose(product(weight, None), truncated(weight), atol=1e-12)
    found = decompose(torch.from_numpy(weight), None, None, RANK)
    np.testing.assert_allclose(found.loss.sqrt(), np.linalg.svd(weight, compute_uv=False), rtol=1e-9)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_asvd_scales_columns_by_the_size_of_their_inputs(shape: tuple[int, int], alpha: float) -> None:
    """SVD_k(W S) S⁻¹ with S = diag(mean|x_j|^alpha); alpha 0 is the plain SVD."""
    weight, x, _ = problem(shape)
    magnitude = np.abs(x).mean(1)
    scale = magnitude**alpha
    expected = truncated(weight * scale) / scale
    metric = activation_metric(torch.from_numpy(magnitude), alpha, 1e-14).numpy()
    np.testing.assert_allclose(product(weight, metric, root="diagonal"), expected, atol=1e-10)
    if alpha == 0.0:
        np.testing.assert_allclose(expected, truncated(weight), atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_output_errors_of_asvd_are_measured_on_the_inputs(shape: tuple[int, int]) -> None:
    """Directions of the diagonal metric are not orthogonal under the Gram; the tails count that."""
    weight, x, _ = problem(shape)
    gram = x @ x.T / x.shape[1]
    metric = activation_metric(torch.from_numpy(np.abs(x).mean(1)), 0.5, 1e-4)
    found = decompose(
        torch.from_numpy(weight), metric, None, min(shape), root="diagonal", output_gram=torch.from_numpy(gram)
    )
    for rank in range(1, min(shape)):
        change = weight - (found.up[:, :rank] @ found.down[:rank]).numpy()
        expected = ((change @ x) ** 2).sum() / x.shape[1]
        assert float(found.error[rank:].sum()) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
def test_svd_llm_v1_and_v2_are_their_papers_and_each_other(shape: tuple[int, int]) -> None:
    """v1: SVD_k(W L) L⁻¹, L the Cholesky factor; v2: SVD_k(W Q Λ^½) Λ^-½ Qᵀ. With F = I gfw-svd is both."""
    weight, x, _ = problem(shape)
    gram = x @ x.T / x.shape[1]
    lower = np.linalg.cholesky(gram)
    first = truncated(weight @ lower) @ np.linalg.inv(lower)
    values, vectors = np.linalg.eigh(gram)
    root = vectors * np.sqrt(values)
    second = truncated(weight @ root) @ np.diag(values**-0.5) @ vectors.T
    for found in (
        product(weight, gram),
        product(weight, gram, root="eigen"),
        product(weight, gram, np.eye(shape[0])),
    ):
        np.testing.assert_allclose(found, first, atol=1e-9)
        np.testing.assert_allclose(found, second, atol=1e-9)


def test_v2_needs_no_damping_where_tokens_are_few() -> None:
    """Three tokens in eleven features: the eigendecomposition drops what they never visit, and fits them exactly."""
    weight, x, _ = problem((13, 11))
    x = x[:, :RANK]
    found = product(weight, x @ x.T, root="eigen")
    np.testing.assert_allclose(found @ x, weight @ x, atol=1e-8)
    np.testing.assert_allclose(found, weight @ x @ np.linalg.pinv(x), atol=1e-8)


class Update:
    """SVD-LLM's update by generic least squares on the tokens themselves."""

    def __init__(self, shape: tuple[int, int], anchored: bool, metric: bool) -> None:
        self.weight, self.x, self.shifted = problem(shape, 3)
        self.outputs = self.weight @ (self.x if anchored else self.shifted)
        rng = np.random.default_rng(4)
        self.h = rng.standard_normal((shape[0] + 1, shape[0])) if metric else np.eye(shape[0])
        tokens = self.x.shape[1]
        gram = self.shifted @ self.shifted.T / tokens
        drift = (self.x - self.shifted) @ self.shifted.T / tokens
        self.gram = torch.from_numpy(gram)
        given = torch.from_numpy(self.weight)
        self.target = anchored_target(given, torch.from_numpy(drift), self.gram, 1e-15) if anchored else given
        self.metric = torch.from_numpy(self.h.T @ self.h) if metric else None
        start = decompose(given, torch.from_numpy(self.x @ self.x.T / tokens), None, RANK)
        self.up, self.down = start.up.numpy(), start.down.numpy()

    def value(self, up: np.ndarray, down: np.ndarray) -> float:
        return float(((self.h @ (self.outputs - up @ down @ self.shifted)) ** 2).sum())

    def ours(self) -> tuple[np.ndarray, np.ndarray]:
        given = torch.from_numpy(self.up), torch.from_numpy(self.down)
        up, down = updated(self.target, self.gram, self.metric, *given)
        return up.numpy(), down.numpy()

    def expected(self) -> tuple[np.ndarray, np.ndarray]:
        """U by rows of a regression on V X', then V by a regression on the Kronecker product of (H U) and X'."""
        up = np.linalg.lstsq((self.down @ self.shifted).T, self.outputs.T, rcond=None)[0].T
        design = np.kron(self.h @ up, self.shifted.T)
        solved = np.linalg.lstsq(design, (self.h @ self.outputs).reshape(-1), rcond=None)[0]
        return up, solved.reshape(RANK, -1)


@pytest.mark.parametrize("metric", [False, True])
@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_update_is_least_squares_twice(shape: tuple[int, int], anchored: bool, metric: bool) -> None:
    case = Update(shape, anchored, metric)
    up, down = case.ours()
    expected_up, expected_down = case.expected()
    np.testing.assert_allclose(up @ down, expected_up @ expected_down, atol=1e-7)
    start, half, end = case.value(case.up, case.down), case.value(expected_up, case.down), case.value(up, down)
    assert end <= half * (1 + 1e-10)
    assert half <= start * (1 + 1e-10)
    assert end < 0.999 * start, "nothing was updated"
    best = decompose(case.target, case.gram, case.metric, RANK)
    assert case.value(best.up.numpy(), best.down.numpy()) <= end * (1 + 1e-9)
    np.testing.assert_allclose(np.linalg.norm(up, axis=0), np.linalg.norm(down, axis=1))


@pytest.mark.parametrize("anchored", [False, True])
def test_an_optimum_is_not_moved_by_the_update(anchored: bool) -> None:
    case = Update((9, 11), anchored, False)
    best = decompose(case.target, case.gram, None, RANK)
    up, down = updated(case.target, case.gram, None, best.up, best.down)
    torch.testing.assert_close(up @ down, best.up @ best.down, rtol=0, atol=1e-9)


def test_the_update_survives_a_zero_weight_and_few_tokens() -> None:
    zero = torch.zeros(4, 6)
    up, down = updated(zero, torch.eye(6), None, torch.zeros(4, 2), torch.zeros(2, 6))
    assert float((up @ down).abs().max()) == 0.0
    weight, x, shifted = (torch.from_numpy(part) for part in problem((7, 11)))
    gram = damped(shifted[:, :2] @ shifted[:, :2].T, 1e-4)
    start = decompose(weight, damped(x[:, :2] @ x[:, :2].T, 1e-4), None, RANK)
    up, down = updated(weight, gram, None, start.up, start.down)
    before, after = (quadratic_error(weight - p, gram) for p in (start.up @ start.down, up @ down))
    assert after <= before * (1 + 1e-9)
