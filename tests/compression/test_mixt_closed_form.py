"""The closed forms of MixT against least squares on design matrices built from Kronecker products."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from mixt_export.compression.tensor_mixture.closed_form import fit, match
from mixt_export.errors import CheckpointError
from mixt_export.reference.tensor_mixture import MixTShape

#: in, out, N_T, d; then whether the paper's padding is on.
EXACT = [(8, 12, 2, 2), (12, 8, 3, 2), (16, 24, 4, 2), (18, 9, 3, 3), (10, 5, 2, 5)]
PADDED = [(5, 7, 2, 2), (6, 11, 3, 2), (12, 5, 3, 2), (7, 10, 2, 3), (8, 8, 3, 2)]
SHAPES = [(*sizes, False) for sizes in EXACT] + [(*sizes, True) for sizes in PADDED]


def shape_of(sizes: tuple[int, int, int, int, bool]) -> MixTShape:
    in_features, out_features, terms, bond, padded = sizes
    return MixTShape(in_features, out_features, terms, bond, padded, 1 / terms)


def power(size: int, bond: int) -> int:
    return next(bond**exponent for exponent in range(20) if bond**exponent >= size)


def wide(sizes: tuple[int, int, int, int, bool]) -> tuple[int, int]:
    """(out, in) of the operator before it is cropped."""
    in_features, out_features, _, bond, padded = sizes
    return (power(out_features, bond), power(in_features, bond)) if padded else (out_features, in_features)


def design(sizes: tuple[int, int, int, int, bool]) -> np.ndarray:
    """Columns: the flattened wide operator of every single core entry set to 1, cores in order, row-major."""
    _, _, terms, bond, _ = sizes
    out_wide, in_wide = wide(sizes)
    spectators = bond ** (terms - 1)
    columns = []
    for k in range(terms):
        for entry in range(out_wide * in_wide // spectators**2):
            core = np.zeros((out_wide // spectators, in_wide // spectators))
            core.flat[entry] = 1 / terms
            columns.append(np.kron(np.kron(np.eye(bond**k), core), np.eye(bond ** (terms - 1 - k))).ravel())
    return np.stack(columns, axis=1)


def operator(cores: list[torch.Tensor], sizes: tuple[int, int, int, int, bool]) -> np.ndarray:
    """The wide operator of ``cores``, not cropped."""
    flat = np.concatenate([core.numpy().ravel() for core in cores])
    return (design(sizes) @ flat).reshape(wide(sizes))


def cropped_design(sizes: tuple[int, int, int, int, bool]) -> np.ndarray:
    in_features, out_features = sizes[:2]
    whole = design(sizes).reshape(*wide(sizes), -1)
    return whole[:out_features, :in_features].reshape(out_features * in_features, -1)


@pytest.mark.parametrize("sizes", SHAPES)
def test_matching_is_least_squares_on_the_weight(sizes: tuple[int, int, int, int, bool]) -> None:
    rng = np.random.default_rng(sum(sizes))
    weight = rng.standard_normal((sizes[1], sizes[0]))
    target = np.zeros(wide(sizes))
    target[: sizes[1], : sizes[0]] = weight
    columns = design(sizes)
    best = columns @ np.linalg.lstsq(columns, target.ravel(), rcond=None)[0]
    cores = match(torch.from_numpy(weight), shape_of(sizes))
    assert all(core.dtype == torch.float64 and tuple(core.shape) == shape_of(sizes).core_shape for core in cores)
    np.testing.assert_allclose(operator(cores, sizes).ravel(), best, atol=1e-12)


@pytest.mark.parametrize("sizes", SHAPES)
def test_matching_gives_back_a_mixt(sizes: tuple[int, int, int, int, bool]) -> None:
    rng = np.random.default_rng(1)
    shape = shape_of(sizes)
    whole = operator([torch.from_numpy(rng.standard_normal(shape.core_shape)) for _ in range(sizes[2])], sizes)
    uncropped = MixTShape(whole.shape[1], whole.shape[0], sizes[2], sizes[3], False, 1 / sizes[2])
    np.testing.assert_allclose(operator(match(torch.from_numpy(whole), uncropped), sizes), whole, atol=1e-12)


@pytest.mark.parametrize(("sizes", "seeds"), [((16, 16, 2, 2, False), 60), ((16, 24, 3, 2, False), 60)])
def test_captured_energy_is_the_share_of_the_degrees_of_freedom(
    sizes: tuple[int, int, int, int, bool], seeds: int
) -> None:
    """On matrices without structure; degrees of freedom are the rank of the design matrix, fewer than the entries."""
    columns = design(sizes)
    freedom = np.linalg.matrix_rank(columns)
    assert freedom < columns.shape[1]
    terms, spectators = sizes[2], sizes[3] ** (sizes[2] - 1)
    local = sizes[0] * sizes[1] // spectators**2
    assert freedom == terms * local - (terms - 1) * local // sizes[3] ** 2  # methods: neighbouring cores overlap
    captured = []
    for seed in range(seeds):
        weight = torch.from_numpy(np.random.default_rng(seed).standard_normal((sizes[1], sizes[0])))
        captured.append((operator(match(weight, shape_of(sizes)), sizes) ** 2).sum() / float(weight.square().sum()))
    assert np.mean(captured) == pytest.approx(freedom / columns.shape[0], rel=0.05)


def problem(sizes: tuple[int, int, int, int, bool], tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Wanted outputs (tokens, out), correlated inputs (tokens, in), positive token weights (tokens,)."""
    rng = np.random.default_rng(tokens + sum(sizes))
    x = rng.standard_normal((tokens, sizes[0])) @ rng.standard_normal((sizes[0], sizes[0])) + 0.5
    y = x @ rng.standard_normal((sizes[0], sizes[1])) + 0.1 * rng.standard_normal((tokens, sizes[1]))
    return y, x, rng.uniform(0.1, 3.0, tokens)


def loss(product: np.ndarray, y: np.ndarray, x: np.ndarray, w: np.ndarray) -> float:
    return float((w * ((y - x @ product.T) ** 2).sum(1)).mean())


def moments(y: np.ndarray, x: np.ndarray, w: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    weighted = x * (w / len(w))[:, None]
    return torch.from_numpy(y.T @ weighted), torch.from_numpy(x.T @ weighted)


@pytest.mark.parametrize("sizes", SHAPES)
def test_fitting_reaches_the_weighted_least_squares_optimum(sizes: tuple[int, int, int, int, bool]) -> None:
    """Cropped outputs carry no loss: in the paper's form the optimum is lower than that of padded outputs."""
    in_features, out_features = sizes[:2]
    y, x, w = problem(sizes, 80)
    root = np.sqrt(w)[:, None]
    per_entry = cropped_design(sizes).reshape(out_features, in_features, -1)
    columns = np.einsum("ti,oip->top", x * root, per_entry).reshape(80 * out_features, -1)
    flat = np.linalg.lstsq(columns, (y * root).ravel(), rcond=None)[0]
    best = loss((cropped_design(sizes) @ flat).reshape(out_features, in_features), y, x, w)
    cross, gram = moments(y, x, w)
    start = match(cross, shape_of(sizes))
    losses = []
    for sweeps in (0, 1, 2, 8, 600):
        cores = fit(cross, gram, shape_of(sizes), sweeps=sweeps, start=start)
        losses.append(loss(operator(cores, sizes)[:out_features, :in_features], y, x, w))
    assert all(later < earlier * (1 + 1e-9) for earlier, later in itertools.pairwise(losses))
    assert losses[1] < losses[0]
    assert losses[-1] == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("sizes", [SHAPES[1], SHAPES[6]])
def test_fitting_is_stationary_at_every_core(sizes: tuple[int, int, int, int, bool]) -> None:
    """The last core solved for has gradient zero, in any number of sweeps: wrong traces would not."""
    y, x, w = problem(sizes, 60)
    cross, gram = moments(y, x, w)
    cores = fit(cross, gram, shape_of(sizes), sweeps=1, start=match(cross, shape_of(sizes)))
    product = operator(cores, sizes)[: sizes[1], : sizes[0]]
    gradient = (product @ gram.numpy() - cross.numpy()).ravel() @ cropped_design(sizes)
    last = gradient[-cores[-1].numel() :]
    assert np.abs(last).max() < 1e-9 * np.abs(gradient).max()


def test_the_ridge_pulls_towards_the_start() -> None:
    sizes = SHAPES[1]
    y, x, w = problem(sizes, 60)
    cross, gram = moments(y, x, w)
    start = match(cross, shape_of(sizes))

    def distance(ridge: float) -> float:
        cores = fit(cross, gram, shape_of(sizes), ridge=ridge, sweeps=3, start=start)
        return float(sum((core - first).square().sum() for core, first in zip(cores, start, strict=True)))

    distances = [distance(ridge) for ridge in (0.0, 0.1, 10.0, 1e9)]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 1e-9 * distances[0]


@pytest.mark.parametrize("sizes", [SHAPES[0], SHAPES[5]])
def test_fewer_tokens_than_features_give_finite_cores(sizes: tuple[int, int, int, int, bool]) -> None:
    y, x, w = problem(sizes, 2)
    cross, gram = moments(y, x, w)
    cores = fit(cross, gram, shape_of(sizes), ridge=1e-3, sweeps=3, start=match(cross, shape_of(sizes)))
    assert all(bool(torch.isfinite(core).all()) for core in cores)
    zero = fit(0 * cross, 0 * gram, shape_of(sizes), sweeps=1, start=match(cross, shape_of(sizes)))
    assert all(bool(torch.isfinite(core).all()) for core in zero)


def test_moments_that_overflow_are_refused() -> None:
    sizes = SHAPES[0]
    cross, gram = moments(*problem(sizes, 9))
    gram[0, 0] = torch.inf
    with pytest.raises(CheckpointError, match="not finite"):
        fit(cross, gram, shape_of(sizes), start=match(cross, shape_of(sizes)))


def test_where_nothing_was_read_the_start_stays() -> None:
    sizes = SHAPES[0]
    y, x, w = problem(sizes, 20)
    cross, gram = moments(y, x, w)
    start = match(cross, shape_of(sizes))
    kept = fit(0 * cross, 0 * gram, shape_of(sizes), ridge=1e-3, sweeps=2, start=start)
    for core, first in zip(kept, start, strict=True):
        torch.testing.assert_close(core, first, rtol=1e-12, atol=0)
