"""Closed forms against independent optimisers: numpy only, float64, odd shapes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mixt_export.compression.closed_form import anchored_target, damped, decompose, quadratic_error
from mixt_export.compression.roots import cholesky
from mixt_export.errors import CheckpointError

SHAPES = [(7, 11), (11, 7), (6, 6)]
OBJECTIVES = ["input-agnostic", "input-aware", "shift-aware", "anchored"]


class Problem:
    """A random instance: minimise ||H (W A - W' B)||_F² / tokens over rank-k W'; F = HᵀH is the output metric."""

    def __init__(self, objective: str, shape: tuple[int, int], seed: int, metric: bool) -> None:
        rng = np.random.default_rng(seed)
        self.out, self.inp, self.tokens = *shape, 40
        self.w = rng.standard_normal(shape)
        x = rng.standard_normal((self.inp, self.inp)) @ rng.standard_normal((self.inp, self.tokens))
        shifted = x + 0.5 * rng.standard_normal(x.shape)
        eye = np.eye(self.inp)
        self.a, self.b = {
            "input-agnostic": (eye, eye),
            "input-aware": (x, x),
            "shift-aware": (shifted, shifted),
            "anchored": (x, shifted),
        }[objective]
        self.count = self.a.shape[1]
        self.h = rng.standard_normal((self.out + 2, self.out)) if metric else np.eye(self.out)

    def value(self, approximation: np.ndarray) -> float:
        return float(((self.h @ (self.w @ self.a - approximation @ self.b)) ** 2).sum() / self.count)

    def solve(self, rank: int) -> tuple[np.ndarray, float]:
        """Ours: the product of the factors, and the value that the singular values promise."""
        w, a, b = (torch.from_numpy(array) for array in (self.w, self.a, self.b))
        gram, cross = b @ b.T / self.count, a @ b.T / self.count
        target = w if a is b or torch.equal(a, b) else anchored_target(w, cross - gram, gram, 1e-15)
        found = decompose(target, gram, torch.from_numpy(self.h.T @ self.h), rank)
        floor = self.value(target.numpy())  # what even a full-rank replacement cannot reach
        return (found.up @ found.down).numpy(), floor + float(found.loss[rank:].sum())


def alternating(problem: Problem, rank: int, sweeps: int = 120) -> float:
    """Alternating least squares on vec(U V): an optimiser that knows nothing of singular values. Best of 2 starts."""
    best = np.inf
    left, right = np.linalg.pinv(problem.h), np.linalg.pinv(problem.b)
    for seed in range(2):
        rng = np.random.default_rng(100 + seed)
        v = rng.standard_normal((rank, problem.inp))
        goal = problem.h @ problem.w @ problem.a
        for _ in range(sweeps):
            u = left @ goal @ np.linalg.pinv(v @ problem.b)
            v = np.linalg.pinv(problem.h @ u) @ goal @ right
        best = min(best, problem.value(u @ v))
    return best


@pytest.mark.parametrize("metric", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_closed_form_is_the_optimum_and_its_value_is_known(
    objective: str, shape: tuple[int, int], metric: bool
) -> None:
    problem = Problem(objective, shape, 1, metric)
    for rank in (1, 3):
        found, promised = problem.solve(rank)
        assert np.linalg.matrix_rank(found) == rank
        value = problem.value(found)
        assert value == pytest.approx(promised, rel=1e-8)
        rival = alternating(problem, rank)
        assert value <= rival * (1 + 1e-9)
        assert value == pytest.approx(rival, rel=1e-3)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_direction_improves_on_the_closed_form(objective: str) -> None:
    """Every small step of the factors, the gradient's included, makes the objective worse."""
    problem = Problem(objective, (7, 11), 2, True)
    found, _ = problem.solve(4)
    value = problem.value(found)
    u, s, v = np.linalg.svd(found)
    left, right = u[:, :4] * s[:4], v[:4]
    rng = np.random.default_rng(0)
    for _ in range(50):
        moved = (left + 1e-3 * rng.standard_normal(left.shape)) @ (right + 1e-3 * rng.standard_normal(right.shape))
        assert problem.value(moved) >= value * (1 - 1e-12)


def test_each_objective_wins_at_its_own_game() -> None:
    """In the anchored objective: anchored <= input-aware <= plain, on shifted inputs."""
    problem = Problem("anchored", (9, 12), 3, False)
    values = {}
    for objective in ("anchored", "input-aware", "input-agnostic"):
        found, _ = Problem(objective, (9, 12), 3, False).solve(4)
        values[objective] = problem.value(found)
    assert values["anchored"] < values["input-aware"] < values["input-agnostic"]


def test_anchored_equals_generic_reduced_rank_regression() -> None:
    """Regress Y = W A on B, project on the leading left singular vectors of the fit: Izenman 1975."""
    problem = Problem("anchored", (7, 11), 4, False)
    y = problem.w @ problem.a
    fit = y @ problem.b.T @ np.linalg.inv(problem.b @ problem.b.T)
    u = np.linalg.svd(fit @ problem.b)[0][:, :3]
    found, _ = problem.solve(3)
    np.testing.assert_allclose(found, u @ u.T @ fit, atol=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("metric", [False, True])
def test_full_rank_gives_the_weight_back(shape: tuple[int, int], metric: bool) -> None:
    problem = Problem("input-aware", shape, 5, metric)
    found, _ = problem.solve(min(shape))
    np.testing.assert_allclose(found, problem.w, atol=1e-11)


@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_survives_singular_statistics(shape: tuple[int, int]) -> None:
    """Two tokens, one gradient: Grams of rank 2 and 1, damped a little."""
    rng = np.random.default_rng(6)
    w = torch.from_numpy(rng.standard_normal(shape))
    x, g = torch.from_numpy(rng.standard_normal((shape[1], 2))), torch.from_numpy(rng.standard_normal((shape[0], 1)))
    found = decompose(w, damped(x @ x.T, 1e-4), damped(g @ g.T, 1e-4), min(shape))
    torch.testing.assert_close(found.up @ found.down, w, rtol=1e-9, atol=1e-9)
    plain = decompose(w, damped(torch.zeros(shape[1], shape[1]), 1e-4), None, min(shape))
    torch.testing.assert_close(plain.loss.sqrt(), torch.linalg.svdvals(w), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_output_errors_are_tails_too(shape: tuple[int, int]) -> None:
    """The plain output error of every rank follows from per-direction terms although F decided the directions."""
    rng = np.random.default_rng(7)
    w = torch.from_numpy(rng.standard_normal(shape))
    x, h = (torch.from_numpy(rng.standard_normal((n, 30))) for n in (shape[1], shape[0]))
    gram, metric = x @ x.T / 30, h @ h.T / 30
    found = decompose(w, gram, metric, min(shape))
    for rank in range(1, min(shape)):
        difference = w - found.up[:, :rank] @ found.down[:rank]
        assert quadratic_error(difference, gram) == pytest.approx(float(found.error[rank:].sum()), rel=1e-8)
        expected = float(torch.trace(metric @ difference @ gram @ difference.T))
        assert expected == pytest.approx(float(found.loss[rank:].sum()), rel=1e-8)


def test_factors_are_balanced_and_zero_weights_are_harmless() -> None:
    rng = np.random.default_rng(8)
    w = torch.from_numpy(1e4 * rng.standard_normal((9, 5)))
    found = decompose(w, torch.eye(5, dtype=torch.float64) * 1e-6, None, 4)
    torch.testing.assert_close(found.up.norm(dim=0), found.down.norm(dim=1))
    zero = decompose(torch.zeros(4, 6), None, None, 3)
    assert torch.isfinite(zero.up).all()
    assert float((zero.up @ zero.down).abs().max()) == 0.0


def test_the_ridge_of_the_anchored_target_pulls_to_the_weight() -> None:
    """Directions the tokens never visit keep W, they do not go to zero."""
    rng = np.random.default_rng(9)
    w = torch.from_numpy(rng.standard_normal((4, 6)))
    x = torch.from_numpy(rng.standard_normal((6, 2)))
    shifted = 1.5 * x
    target = anchored_target(w, (x - shifted) @ shifted.T, shifted @ shifted.T, 1e-6)
    unseen = torch.linalg.svd(x)[0][:, 2:]
    torch.testing.assert_close(target @ unseen, w @ unseen, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(target @ shifted, w @ x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(anchored_target(w, x @ x.T * 0, x @ x.T * 0, 1e-3), w)


def test_statistics_that_are_not_finite_or_not_moments_are_refused() -> None:
    with pytest.raises(CheckpointError, match="finite"):
        cholesky(torch.full((3, 3), float("nan")))
    with pytest.raises(CheckpointError, match="positive"):
        cholesky(-torch.eye(3))
    with pytest.raises(CheckpointError, match="finite"):
        decompose(torch.full((3, 4), float("inf")), None, None, 2)
