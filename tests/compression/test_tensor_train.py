"""Tensor trains in closed form against dense least squares and singular values in numpy, float64."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
import torch

from mixt_export.compression.tensor_train.decomposition import assembled, balanced_gauge, ranks_within, spectra, tt_svd
from mixt_export.compression.tensor_train.fitting import Outliers, fit, marginals, whitened_svd
from mixt_export.compression.tensor_train.modes import Modes, balanced, largest_ranks, modes_of, parameters, prime
from mixt_export.errors import UsageError

TWO: Modes = ((6, 8), (9, 4))
THREE: Modes = ((4, 3, 5), (2, 6, 3))


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gram(seed: int, size: int) -> torch.Tensor:
    """A badly conditioned second moment."""
    x = random(seed, 3 * size, size) * torch.logspace(0, -2, size, dtype=torch.float64)
    x = x @ random(seed + 1, size, size)
    return x.T @ x / len(x)


def matrix_of(cores: list[torch.Tensor], modes: Modes) -> np.ndarray:
    """Entry by entry: the product of one matrix per site."""
    inputs, outputs = modes
    found = np.zeros((prod(outputs), prod(inputs)))
    for row, out in enumerate(np.ndindex(*outputs)):
        for column, inside in enumerate(np.ndindex(*inputs)):
            chain = np.ones((1, 1))
            for core, o, i in zip(cores, out, inside, strict=True):
                chain = chain @ core[:, o, i, :].numpy()
            found[row, column] = chain[0, 0]
    return found


def loss(rest: torch.Tensor, metric: torch.Tensor) -> float:
    return float(torch.trace(rest @ metric @ rest.T))


@pytest.mark.parametrize("modes", [TWO, THREE])
def test_full_ranks_give_the_matrix_back(modes: Modes) -> None:
    weight = random(0, prod(modes[1]), prod(modes[0]))
    cores = tt_svd(weight, modes, largest_ranks(modes))
    np.testing.assert_allclose(matrix_of(cores, modes), weight.numpy(), atol=1e-12)
    np.testing.assert_allclose(matrix_of(balanced_gauge(cores), modes), weight.numpy(), atol=1e-12)
    np.testing.assert_allclose(assembled(cores, modes).numpy(), weight.numpy(), atol=1e-12)


def test_two_cores_are_the_truncated_svd_of_the_rearranged_matrix() -> None:
    weight = random(1, 36, 48)
    rearranged = weight.numpy().reshape(9, 4, 6, 8).transpose(0, 2, 1, 3).reshape(54, 32)
    values = np.linalg.svd(rearranged, compute_uv=False)
    error = (weight - assembled(tt_svd(weight, TWO, (7,)), TWO)).norm().item()
    assert error == pytest.approx(np.sqrt((values[7:] ** 2).sum()), rel=1e-12)
    np.testing.assert_allclose(spectra(weight, TWO)[0].sqrt().numpy(), values, rtol=1e-10)


def test_error_of_more_cores_stays_within_the_bound() -> None:
    weight = random(2, 36, 60)
    ranks = (5, 6)
    tails = sum(float(value[rank:].sum()) for value, rank in zip(spectra(weight, THREE), ranks, strict=True))
    largest = max(float(value[rank:].sum()) for value, rank in zip(spectra(weight, THREE), ranks, strict=True))
    error = float((weight - assembled(tt_svd(weight, THREE, ranks), THREE)).square().sum())
    assert largest <= error <= tails
    improved = fit(weight, None, THREE, tt_svd(weight, THREE, ranks), sweeps=4, steps=4)
    assert largest <= improved.losses[-1] * float(weight.square().sum()) < 0.995 * error


@pytest.mark.parametrize("modes", [TWO, THREE])
def test_a_product_metric_is_solved_by_folding_it_into_the_cores(modes: Modes) -> None:
    """Under S = ⊗ S_k two cores reach Eckart and Young's optimum, and more descent finds nothing."""
    metrics = [gram(10 + site, size) + 0.1 * torch.eye(size) for site, size in enumerate(modes[0])]
    product = metrics[0]
    for metric in metrics[1:]:
        product = torch.kron(product, metric)
    for found, metric in zip(marginals(product, modes[0]), metrics, strict=True):
        torch.testing.assert_close(found / found[0, 0], metric / metric[0, 0])
    weight = random(3, prod(modes[1]), prod(modes[0]))
    ranks = tuple(max(1, rank // 3) for rank in largest_ranks(modes))
    cores = whitened_svd(weight, marginals(product, modes[0]), modes, ranks)
    start = loss(weight - assembled(cores, modes), product)
    plain = loss(weight - assembled(tt_svd(weight, modes, ranks), modes), product)
    assert start < 0.8 * plain
    if len(ranks) == 1:
        lower = np.kron(*(np.linalg.cholesky(metric.numpy()) for metric in metrics))
        seen = (weight.numpy() @ lower).reshape(9, 4, 6, 8).transpose(0, 2, 1, 3).reshape(54, 32)
        values = np.linalg.svd(seen, compute_uv=False)
        assert start == pytest.approx((values[ranks[0] :] ** 2).sum(), rel=1e-9)
        after = fit(weight, product, modes, cores, sweeps=2, steps=20)
        assert after.losses[-1] == pytest.approx(after.losses[0], rel=1e-6)


@pytest.mark.parametrize("modes", [TWO, THREE])
def test_every_sweep_lowers_the_weighted_loss(modes: Modes) -> None:
    weight, metric = random(4, prod(modes[1]), prod(modes[0])), gram(5, prod(modes[0]))
    ranks = tuple(max(1, rank // 3) for rank in largest_ranks(modes))
    found = fit(weight, metric, modes, tt_svd(weight, modes, ranks), sweeps=5, steps=6)
    assert all(after <= before * (1 + 1e-9) for before, after in zip(found.losses, found.losses[1:], strict=False))
    assert found.losses[-1] < 0.5 * found.losses[0]
    rest = weight - torch.from_numpy(matrix_of(found.cores, modes))
    assert found.losses[-1] == pytest.approx(loss(rest, metric) / loss(weight, metric), rel=1e-9)


def test_one_core_is_solved_exactly() -> None:
    """With many steps a core is the least squares solution: numpy's, from the normal matrix of all its entries."""
    weight, metric = random(6, 36, 48), gram(7, 48) + 0.05 * torch.eye(48)
    cores = tt_svd(weight, TWO, (3,))
    lower = np.linalg.cholesky(metric.numpy())
    columns = []
    for index in range(cores[0].numel()):
        unit = torch.zeros_like(cores[0]).reshape(-1)
        unit[index] = 1.0
        columns.append((assembled([unit.reshape(cores[0].shape), cores[1]], TWO).numpy() @ lower).ravel())
    system = np.stack(columns, 1)
    wanted = (weight.numpy() @ lower).ravel()
    best = np.linalg.lstsq(system, wanted, rcond=None)[0]
    least = float(((system @ best - wanted) ** 2).sum() / (wanted**2).sum())
    from mixt_export.compression.tensor_train import fitting

    problem = fitting._Problem(weight, metric, TWO)
    right = fitting._right_orthogonal(cores)
    right[0] = problem.improved(right, 0, None, 200)
    assert problem.loss(right, None) == pytest.approx(least, rel=1e-5)


def test_outliers_take_what_the_train_cannot_hold() -> None:
    weight, metric = random(8, 36, 48), gram(9, 48)
    weight[3, 7], weight[30, 2] = 40.0, -35.0
    outliers = Outliers.largest(weight, 2)
    assert sorted(zip(outliers.rows.tolist(), outliers.columns.tolist(), strict=True)) == [(3, 7), (30, 2)]
    start = tt_svd(weight - outliers.matrix(weight), TWO, (8,))
    found = fit(weight, metric, TWO, start, sweeps=3, steps=8, outliers=outliers)
    without = fit(weight, metric, TWO, tt_svd(weight, TWO, (8,)), sweeps=3, steps=8)
    rest = weight - found.matrix(TWO)
    assert found.losses[-1] == pytest.approx(loss(rest, metric) / loss(weight, metric), rel=1e-9)
    assert loss(rest, metric) < loss(weight - without.matrix(TWO), metric)
    # the values are optimal for the train: the gradient at their places has vanished beside that of the start
    gradient = (rest @ metric)[found.outliers.rows, found.outliers.columns]  # type: ignore[union-attr]
    assert float(gradient.abs().max()) < 1e-2 * float((weight @ metric).abs().max())


@pytest.mark.parametrize("modes", [TWO, THREE, ((2, 2, 3, 2, 2), (3, 1, 2, 3, 2))])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_ranks_fill_the_budget(modes: Modes, share: float) -> None:
    weight = random(11, prod(modes[1]), prod(modes[0]))
    budget = int(share * weight.numel())
    ranks = ranks_within(spectra(weight, modes), modes, budget)
    used = parameters(modes, ranks)
    assert used <= budget
    cores = tt_svd(weight, modes, ranks)
    assert tuple(core.shape[-1] for core in cores[:-1]) == ranks
    for bond in range(len(ranks)):
        raised = [*ranks[:bond], ranks[bond] + 1, *ranks[bond + 1 :]]
        if ranks[bond] < largest_ranks(modes)[bond] and len(ranks) < 3:
            assert parameters(modes, raised) > budget


def test_modes() -> None:
    assert (balanced(576, 2), balanced(576, 3), balanced(4096, 3)) == ((24, 24), (8, 8, 9), (16, 16, 16))
    assert prime(4096, 12) == (2,) * 12
    assert prime(11008, 12) == (1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 43)
    assert all(prod(split(n, d)) == n for split in (balanced, prime) for n in (1, 13, 360, 1536) for d in (2, 5, 12))
    names, shapes = ["a.q_proj", "a.up_proj"], [(48, 48), (104, 48)]
    found = modes_of(["prime", "up=4x12:8x13"], names, shapes, 2)
    assert found == [((6, 8), (6, 8)), ((4, 12), (8, 13))]


@pytest.mark.parametrize(
    ("items", "cores", "message"),
    [
        (["6x8:6x9"], 3, r"output modes 6x9 multiply up to 54, but a.q_proj has 48"),
        (["6x8:4x3x4"], 3, "2 input modes and 3 output modes"),
        (["48:48"], 3, "give 2 to 12 modes"),
        (["sideways"], 3, "give balanced, prime"),
        (["o_proj=prime"], 3, "matches none of the 1"),
        (["(=prime"], 3, "not a regular expression"),
        (["prime", "balanced"], 3, "two of them are for every linear"),
        ([], 1, "2 to 12 cores"),
        ([], 13, "2 to 12 cores"),
    ],
)
def test_bad_modes(items: list[str], cores: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        modes_of(items, ["a.q_proj"], [(48, 48)], cores)
