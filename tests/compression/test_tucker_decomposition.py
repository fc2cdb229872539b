"""Partial Tucker: exact where it can be, the planted optimum, monotone; against numpy einsums of its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mixt_export.compression.tucker.decomposition import hooi, hosvd, most, rebuilt
from mixt_export.errors import CheckpointError

torch.set_num_threads(1)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def planted(seed: int, noise: float) -> torch.Tensor:
    """A Tucker model of ranks (3, 2, 2) with four copies, and noise beside it."""
    rng = np.random.default_rng(seed)
    factors = [np.linalg.qr(rng.standard_normal((size, rank)))[0] for size, rank in ((11, 3), (7, 2), (5, 2))]
    core = rng.standard_normal((3, 2, 2, 4))
    exact = np.einsum("abch,ia,jb,kc->ijkh", core, *factors)
    return torch.from_numpy(exact + noise * rng.standard_normal(exact.shape))


@pytest.mark.parametrize("shape", [(9, 4, 3, 5), (3, 17, 2, 1), (6, 5, 4), (40, 3, 2, 2)])
def test_full_ranks_are_exact(shape: tuple[int, ...]) -> None:
    tensor = random(*shape)
    copies = int(np.prod(shape[3:]))
    bases = hosvd(tensor, 3)
    found = hooi(tensor, bases.truncated(most(shape[:3], shape[:3], copies)))
    assert found.error < 1e-14
    assert torch.allclose(rebuilt(found), tensor, atol=1e-12)
    for factor in found.factors:
        assert torch.allclose(factor.T @ factor, torch.eye(factor.shape[1], dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_a_planted_model_is_found_exactly(seed: int) -> None:
    tensor = planted(seed, 0.0)
    found = hooi(tensor, hosvd(tensor, 3).truncated((3, 2, 2)))
    assert float((rebuilt(found) - tensor).norm() / tensor.norm()) < 1e-12


@pytest.mark.parametrize("seed", range(3))
def test_a_planted_model_in_noise_is_fitted_at_least_as_well_as_it_was_planted(seed: int) -> None:
    """The truth has the error of the noise; the optimum is below that, by the noise its free numbers take up."""
    tensor, exact = planted(seed, 0.05), planted(seed, 0.0)
    found = hooi(tensor, hosvd(tensor, 3).truncated((3, 2, 2)), tolerance=0.0)
    noise = float((tensor - exact).square().sum() / tensor.square().sum())
    free = 3 * 2 * 2 * 4 + 3 * (11 - 3) + 2 * (7 - 2) + 2 * (5 - 2)
    assert found.error < noise
    assert found.error == pytest.approx(noise * (1 - free / tensor.numel()), rel=0.2)


@pytest.mark.parametrize("ranks", [(4, 3, 2), (1, 1, 1), (7, 2, 3)])
def test_sweeps_never_raise_the_error_and_it_is_what_it_says(ranks: tuple[int, ...]) -> None:
    tensor = random(13, 6, 4, 3, seed=5)
    found = hooi(tensor, hosvd(tensor, 3).truncated(ranks), tolerance=0.0, sweeps=12)
    assert all(after <= before + 1e-15 for before, after in zip(found.errors, found.errors[1:], strict=False))
    assert found.errors[-1] < found.errors[0]
    measured = float((tensor - rebuilt(found)).square().sum() / tensor.square().sum())
    assert found.error == pytest.approx(measured, rel=1e-10)


def test_hooi_stops_at_a_stationary_point() -> None:
    """No small rotation of any factor lowers the error: the gradient on the Grassmannian vanishes."""
    tensor = random(9, 6, 4, 2, seed=3)
    found = hooi(tensor, hosvd(tensor, 3).truncated((3, 2, 2)), tolerance=0.0, sweeps=2000)
    for mode in range(3):
        rest = tensor
        for other, factor in enumerate(found.factors):
            if other != mode:
                rest = torch.tensordot(rest, factor, dims=([other], [0])).movedim(-1, other)
        unfolded = rest.movedim(mode, 0).reshape(tensor.shape[mode], -1)
        u = found.factors[mode]
        gram = unfolded @ unfolded.T @ u
        assert float((gram - u @ (u.T @ gram)).norm() / gram.norm()) < 1e-6


def test_captured_energy_is_that_of_the_truncated_hosvd() -> None:
    tensor = random(8, 5, 3, 2, seed=1)
    bases = hosvd(tensor, 3)
    captured = bases.captured()
    for ranks in ((3, 2, 1), (8, 5, 3), (1, 4, 2)):
        u = bases.truncated(ranks)
        core = np.einsum("ijkh,ia,jb,kc->abch", tensor.numpy(), *(factor.numpy() for factor in u))
        assert float(captured[tuple(rank - 1 for rank in ranks)]) == pytest.approx(float((core**2).sum()), rel=1e-12)


def test_ranks_beyond_the_columns_of_an_unfolding_are_completed() -> None:
    tensor = random(20, 2, 2, seed=2)
    found = hooi(tensor, hosvd(tensor, 2).truncated((12, 2)))
    assert found.factors[0].shape == (20, 12)
    assert torch.allclose(found.factors[0].T @ found.factors[0], torch.eye(12, dtype=torch.float64), atol=1e-12)
    assert found.error < 1e-14


def test_zero_and_not_finite() -> None:
    zero = torch.zeros(4, 3, 2)
    assert hooi(zero, hosvd(zero, 2).truncated((2, 1))).error == 0.0
    zero[1, 1, 1] = float("nan")
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        hosvd(zero, 2)
