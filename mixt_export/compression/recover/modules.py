"""The modules that execute factorised linears in training: the reference's, two plain products where that suffices."""

from __future__ import annotations

import torch
from torch import nn

from mixt_export.network import FactorizedLinear
from mixt_export.reference.linear import Load, LoadIndex, linear_module


class TwoFactors(nn.Module):
    """y = x A B + bias with the factors ``cores`` A (in, rank) and B (rank, out).

    What the reference's module computes, without its sum over branches: with small products that costs a tenth.
    """

    def __init__(self, first: nn.Parameter, second: nn.Parameter, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.cores = nn.ParameterList([first, second])
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        y: torch.Tensor = (x @ self.cores[0]) @ self.cores[1]
        return y if self.bias is None else y + self.bias


def trained_module(linear: FactorizedLinear, load: Load, load_index: LoadIndex) -> nn.Module:
    """TwoFactors for a plain low rank linear in the layout that compress writes, else the reference's module."""
    names = _plain(linear)
    if names is None:
        return linear_module(linear, load, load_index)
    bias = None if linear.bias is None else load(linear.bias.name)
    return TwoFactors(load(names[0]), load(names[1]), bias)


def _plain(linear: FactorizedLinear) -> tuple[str, str] | None:
    """Names of the factors (in, rank) and (rank, out) where they alone make the linear."""
    if linear.sparse is not None or len(linear.branches) != 1:
        return None
    branch = linear.branches[0]
    modes = (*branch.in_modes, *branch.out_modes)
    if len(branch.in_modes) != 1 or len(modes) != 2 or len(branch.cores) != 2 or branch.padded or branch.scale != 1.0:
        return None
    first, second = branch.cores
    (inside, _), (outside, _) = modes
    bond = first.labels[-1]
    if (first.labels, second.labels) != ((inside, bond), (bond, outside)) or bond in (inside, outside):
        return None
    return first.tensor.name, second.tensor.name
