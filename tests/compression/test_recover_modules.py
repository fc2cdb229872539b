"""Modules that training executes, against the reference's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from mixt_export.compression.recover.modules import TwoFactors, trained_module
from mixt_export.compression.recover.settings import rate_for
from mixt_export.network import FactorizedLinear, TensorRef, build
from mixt_export.reference.linear import linear_module


def parameters(linear: FactorizedLinear) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {t.name: nn.Parameter(torch.randn(t.shape, generator=generator)) for t in linear.tensors()}


def no_index(name: str) -> torch.Tensor:
    raise AssertionError(name)


@pytest.mark.parametrize("biased", [False, True])
def test_two_factors_are_the_linear(biased: bool) -> None:
    linear = build.low_rank("block.linear", 7, 5, 3)
    if biased:
        linear = replace(linear, bias=TensorRef("block.linear.bias", (5,), "float32"))
    stored = parameters(linear)
    ours = trained_module(linear, stored.__getitem__, no_index)
    theirs = linear_module(linear, stored.__getitem__, no_index)
    x = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(1))
    assert isinstance(ours, TwoFactors)
    torch.testing.assert_close(ours(x), theirs(x))
    assert {id(p) for p in ours.parameters()} == {id(p) for p in stored.values()}


def test_what_is_not_two_plain_factors_is_left_to_the_reference() -> None:
    linear = build.low_rank("block.linear", 7, 5, 3)
    scaled = replace(linear, branches=(replace(linear.branches[0], scale=0.5),))
    twice = replace(linear, branches=(linear.branches[0], linear.branches[0]))
    for other in (scaled, twice):
        assert not isinstance(trained_module(other, parameters(other).__getitem__, no_index), TwoFactors)


def test_steps_are_shorter_near_the_teacher_and_in_many_blocks() -> None:
    assert rate_for(0.5, 4) == pytest.approx(0.0034, rel=0.02)
    assert rate_for(0.6, 30) == pytest.approx(0.001, rel=0.02)
    assert rate_for(0.8, 30) == pytest.approx(rate_for(0.6, 30) / 2)
    assert rate_for(0.5, 16) == pytest.approx(rate_for(0.5, 4) / 2)
    assert rate_for(1.0) == rate_for(1.3) > 0
