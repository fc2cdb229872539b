"""Block refinement on a tiny model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mixt_export.checkpoints import open_checkpoint
from mixt_export.compression.blocks import BlockwiseModel
from mixt_export.compression.refine import RefineSettings, draws, refine_block, schedule
from mixt_export.errors import UsageError
from mixt_export.reference.tensor_mixture import MixTLinear, MixTShape
from tests.tiny import LINEARS, write_tiny

BLOCK = 1


@pytest.fixture
def model(tmp_path: Path) -> BlockwiseModel:
    return BlockwiseModel(open_checkpoint(write_tiny(tmp_path / "dense", "qwen2")))


def replaced_block(model: BlockwiseModel, dense: nn.Module, seed: int = 0) -> nn.Module:
    """A copy of ``dense`` with random MixT factors and norms of its own."""
    block = model.clone(dense)
    generator = torch.Generator().manual_seed(seed)
    for name in LINEARS:
        old = dense.get_submodule(name)
        assert isinstance(old, nn.Linear)
        shape = MixTShape(old.in_features, old.out_features, 3, scale=1 / 3)
        cores = [nn.Parameter(0.5 * torch.randn(shape.core_shape, generator=generator)) for _ in range(3)]
        bias = None if old.bias is None else nn.Parameter(old.bias.detach().clone())
        block.set_submodule(name, MixTLinear(shape, cores, bias))
    for name, parameter in list(block.named_parameters()):
        if name.endswith("norm.weight"):
            owner, _, last = name.rpartition(".")
            block.get_submodule(owner).register_parameter(last, nn.Parameter(parameter.detach().clone()))
    return block


def streams() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    original = torch.randn(6, 16, 48, generator=generator)
    original[:, 0] *= 100.0
    return original, original + 0.1 * torch.randn(original.shape, generator=generator)


def relative_loss(model: BlockwiseModel, dense: nn.Module, block: nn.Module) -> float:
    original, compressed = streams()
    with torch.no_grad():
        wanted = model.run(dense, BLOCK, original).double().numpy()
        found = model.run(block, BLOCK, compressed).double().numpy()
    x = original.double().numpy()
    moved = ((wanted - x) ** 2).sum(-1) + ((compressed.double().numpy() - x) ** 2).sum(-1)
    return float(np.mean(((found - wanted) ** 2).sum(-1) / moved))


def test_the_relative_loss_falls_and_only_the_copy_changes(model: BlockwiseModel) -> None:
    with model.block(BLOCK) as dense:
        kept = {name: value.detach().clone() for name, value in dense.named_parameters()}
        block = replaced_block(model, dense)
        begun = {name: value.detach().clone() for name, value in block.named_parameters()}
        first = relative_loss(model, dense, block)
        original, compressed = streams()
        settings = RefineSettings(steps=40, batch=3, matrix_rate=0.03)
        report = refine_block(model, BLOCK, dense, block, original, compressed, settings, 0)
        assert torch.equal(original, streams()[0])
        assert all(torch.equal(value, kept[name]) for name, value in dense.named_parameters())
        assert all(not torch.equal(value, begun[name]) for name, value in block.named_parameters())
        assert not any(value.requires_grad for value in block.parameters())
        last = relative_loss(model, dense, block)
    assert last < 0.6 * first
    assert abs(report.before / first - 1) < 0.4
    assert abs(report.after / last - 1) < 0.3
    assert (report.block, report.steps, report.tokens) == (BLOCK, 40, 40 * 3 * 16)


def test_a_token_whose_norm_is_lost_does_not_drown_the_others(model: BlockwiseModel) -> None:
    """An earlier block gave the first token of every window a hundredth of its norm; no block can make up for that."""
    original, compressed = streams()
    original[:, 0] *= 10.0
    compressed[:, 0] = original[:, 0] / 100.0
    with model.block(BLOCK) as dense:
        wanted = model.run(dense, BLOCK, original)[:, 1:]

        def error(block: nn.Module) -> float:
            with torch.no_grad():
                return float((model.run(block, BLOCK, compressed)[:, 1:] - wanted).norm() / wanted.norm())

        block = replaced_block(model, dense)
        first = error(block)
        settings = RefineSettings(steps=40, batch=3, matrix_rate=0.03)
        report = refine_block(model, BLOCK, dense, block, original, compressed, settings, 0)
        assert error(block) < 0.7 * first
        assert report.after < 2.0


def test_training_that_raises_the_loss_is_undone(model: BlockwiseModel) -> None:
    with model.block(BLOCK) as dense:
        block = replaced_block(model, dense)
        begun = [value.detach().clone() for value in block.parameters()]
        settings = RefineSettings(steps=4, batch=2, matrix_rate=30.0)
        report = refine_block(model, BLOCK, dense, block, *streams(), settings, 0)
        assert report.after == report.before
        assert all(torch.equal(a, b) for a, b in zip(block.parameters(), begun, strict=True))


def test_equal_seeds_give_equal_factors(model: BlockwiseModel) -> None:
    made = []
    with model.block(BLOCK) as dense:
        for seed in (0, 0, 1):
            block = replaced_block(model, dense)
            refine_block(model, BLOCK, dense, block, *streams(), RefineSettings(steps=4, batch=2), seed)
            made.append([value.detach().clone() for value in block.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(made[0], made[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(made[0], made[2], strict=True))


def test_a_block_without_factors_is_refused(model: BlockwiseModel) -> None:
    with model.block(BLOCK) as dense, pytest.raises(UsageError, match="no linear of this block is factorised"):
        refine_block(model, BLOCK, dense, model.clone(dense), *streams(), RefineSettings(steps=1), 0)


def test_every_window_comes_once_per_pass() -> None:
    found = torch.cat(list(draws(5, 2, 10, seed=4)))
    assert [sorted(found[start : start + 5].tolist()) for start in range(0, 20, 5)] == [list(range(5))] * 4
    assert [len(part) for part in draws(3, 8, 2, seed=0)] == [3, 3]


def test_the_rate_warms_up_and_falls() -> None:
    rates = [schedule(step, 100, 0.1, 0.05) for step in range(100)]
    assert rates[0] < rates[4] < rates[9]
    assert max(rates) > 0.95
    assert rates[50] == pytest.approx(0.525)
    assert 0.05 <= rates[-1] < 0.06


@pytest.mark.parametrize(
    "given", [{"steps": 0}, {"batch": 0}, {"learning_rate": -1.0}, {"matrix_rate": 0.0}, {"final": 2.0}]
)
def test_settings_that_make_no_sense(given: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="refine"):
        RefineSettings(**given)  # type: ignore[arg-type]
