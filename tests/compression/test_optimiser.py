"""Muon and Adam against their definitions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mixt_export.compression.optimiser import Optimiser, orthogonalised


def parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"wide": (6, 10), "tall": (9, 4), "cube": (2, 3, 4), "vector": (7,)}
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def give_gradients(values: dict[str, nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for value in values.values():
        value.grad = torch.randn(value.shape, generator=generator)


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (5, 5)])
def test_orthogonalised_keeps_the_singular_vectors_and_levels_the_values(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    u, values, vt = torch.linalg.svd(matrix, full_matrices=False)
    inside = u.mT @ orthogonalised(matrix) @ vt.mT
    levelled = inside.diagonal()
    torch.testing.assert_close(inside, torch.diag(levelled), atol=1e-10, rtol=0)
    assert float(values.max() / values.min()) > 2
    assert bool((levelled[values > 0.1 * values.max()] > 0.6).all())
    assert bool((levelled < 1.25).all())


def test_a_matrix_moves_by_its_share_of_its_norm_at_the_start() -> None:
    values = parameters()
    before = {name: value.detach().clone() for name, value in values.items()}
    optimiser = Optimiser(values, 0.01, 1e-3)
    give_gradients(values, 2)
    gradient = values["wide"].grad
    assert gradient is not None
    optimiser.step(0.5)
    for name in ("wide", "tall"):
        moved = (values[name].detach() - before[name]).norm()
        torch.testing.assert_close(moved, 0.005 * before[name].norm(), rtol=1e-4, atol=0)
    step = values["wide"].detach() - before["wide"]
    u, _, vt = torch.linalg.svd(gradient, full_matrices=False)
    assert float((step * (u @ vt)).sum() / step.norm() / (u @ vt).norm()) < -0.95
    assert values["wide"].grad is None


def test_everything_else_is_adam_and_vectors_move_by_a_share_of_their_size() -> None:
    values = parameters()
    with torch.no_grad():
        values["vector"].mul_(0.01)
    size = float(values["vector"].detach().square().mean().sqrt())
    copies = {name: nn.Parameter(values[name].detach().clone()) for name in ("cube", "vector")}
    groups: list[dict[str, Any]] = [{"params": [copies["cube"]]}, {"params": [copies["vector"]], "lr": 1e-2 * size}]
    theirs = torch.optim.Adam(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    ours = Optimiser(values, 0.01, 1e-2)
    for step in range(4):
        give_gradients(values, step)
        for name, copy in copies.items():
            given = values[name].grad
            assert given is not None
            copy.grad = given.clone()
        nn.utils.clip_grad_norm_(list(copies.values()), 1.0)
        theirs.step()
        ours.step(1.0)
        for name, copy in copies.items():
            torch.testing.assert_close(values[name], copy, rtol=1e-5, atol=1e-8)


def test_a_restored_optimiser_goes_on_as_if_nothing_had_happened() -> None:
    straight, broken = parameters(), parameters()
    one = Optimiser(straight, 0.02, 1e-2)
    two = Optimiser(broken, 0.02, 1e-2)
    for step in range(6):
        give_gradients(straight, step)
        one.step(1.0)
        if step == 3:
            saved, steps = two.tensors(), two.steps
            two = Optimiser(broken, 0.02, 1e-2)
            two.restore(saved, steps)
        give_gradients(broken, step)
        two.step(1.0)
    for name in straight:
        assert torch.equal(straight[name], broken[name])
