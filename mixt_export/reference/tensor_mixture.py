"""MixT (Tensor Mixture, arXiv:2605.25344) in torch: W = scale · Σ_k I_{a_k} ⊗ T_k ⊗ I_{c_k}, with its derivatives.

Term k (from 1 to N) views x as (a_k = d^(k-1), in'/S, c_k = d^(N-k)), S = d^(N-1), and applies T_k (out'/S, in'/S) to
the middle. In the exact form in' and out' are the features; in the paper's they are the next powers of d, the input
zero-padded and the output cropped, both at the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from mixt_export import network
from mixt_export.network import Branch


@dataclass(frozen=True)
class MixTShape:
    """Sizes of one MixT linear. ``terms`` = N, ``bond`` = d; ``padded``: the paper's form (features padded to powers).

    ``scale`` multiplies the sum of the terms (1/N in the paper). Cores are (out'/S, in'/S), one per term.
    Raises ValueError when S does not divide the (padded) features.
    """

    in_features: int
    out_features: int
    terms: int
    bond: int = 2
    padded: bool = False
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.terms < 1 or self.bond < 2:
            raise ValueError(f"MixT needs at least one term and a bond of 2, not {self.terms} and {self.bond}.")
        if self.wide_in % self.spectators or self.wide_out % self.spectators:
            raise ValueError(f"{self.spectators} does not divide {self.wide_in} and {self.wide_out} features.")

    @property
    def spectators(self) -> int:
        """S = d^(N-1): how many slices of the input each core is applied to."""
        return int(self.bond ** (self.terms - 1))

    @property
    def wide_in(self) -> int:
        """in': input features, padded where the form pads."""
        return _power(self.in_features, self.bond) if self.padded else self.in_features

    @property
    def wide_out(self) -> int:
        """out': output features, padded where the form pads."""
        return _power(self.out_features, self.bond) if self.padded else self.out_features

    @property
    def core_shape(self) -> tuple[int, int]:
        """(out'/S, in'/S)."""
        return self.wide_out // self.spectators, self.wide_in // self.spectators

    @property
    def splits(self) -> list[tuple[int, int]]:
        """(a_k, c_k) of every term, k from 1 to N."""
        return [(self.bond**k, self.bond ** (self.terms - 1 - k)) for k in range(self.terms)]

    @property
    def macs(self) -> int:
        """Multiplications per row of x in the route by branches, padding not skipped."""
        return self.terms * self.wide_in * self.wide_out // self.spectators

    @classmethod
    def of(cls, linear: network.FactorizedLinear) -> MixTShape | None:
        """The sizes of ``linear`` if its branches are the terms of one MixT in order, each with its own core.

        None for any other network, one with a sparse residual included.
        """
        if linear.sparse is not None or len(linear.core_tensors()) != len(linear.branches):
            return None
        views = [_view(branch) for branch in linear.branches]
        first = linear.branches[0]
        terms = len(views)
        bond = views[-1][0] if terms == 2 else (views[1][0] if terms > 2 else 2)
        if bond < 2:
            return None
        wanted = [(bond**k, bond ** (terms - 1 - k)) for k in range(terms)]
        if views != wanted or any((b.scale, b.padded) != (first.scale, first.padded) for b in linear.branches):
            return None
        try:
            shape = cls(linear.in_features, linear.out_features, terms, bond, first.padded, first.scale)
        except ValueError:
            return None
        cores = {branch.cores[0].tensor.shape for branch in linear.branches}
        return shape if cores == {shape.core_shape} else None


def densify(cores: Sequence[torch.Tensor], shape: MixTShape) -> torch.Tensor:
    """The matrix (out, in) of ``cores``, differentiable once: the gradient of a core is a partial trace of dW."""
    result: torch.Tensor = _Densify.apply(shape, *cores)  # type: ignore[no-untyped-call]
    return result


def apply(x: torch.Tensor, cores: Sequence[torch.Tensor], shape: MixTShape) -> torch.Tensor:
    """x (..., in) -> (..., out) branch by branch, without bias; neither pass builds a dense matrix.

    Kept for the backward pass: x and the cores, no transposed copies. Differentiable once.
    """
    flat = x.reshape(-1, shape.in_features)
    y: torch.Tensor = _Branches.apply(shape, flat, *cores)  # type: ignore[no-untyped-call]
    return y.reshape(*x.shape[:-1], shape.out_features)


class MixTLinear(nn.Module):
    """y = W x + bias for x (..., in), y (..., out), in the cores' dtype; W from N cores (out'/S, in'/S).

    Many rows at once (training) build W and multiply by it when that is cheaper; few (decoding) go branch by branch.
    """

    def __init__(self, shape: MixTShape, cores: Sequence[nn.Parameter], bias: nn.Parameter | None = None) -> None:
        super().__init__()
        wrong = next((core for core in cores if tuple(core.shape) != shape.core_shape), None)
        if len(cores) != shape.terms or wrong is not None:
            found = f"{len(cores)} cores" if wrong is None else f"a core of shape {tuple(wrong.shape)}"
            raise ValueError(f"MixT needs {shape.terms} cores of shape {shape.core_shape}, found {found}.")
        self.shape = shape
        self.in_features, self.out_features = shape.in_features, shape.out_features
        self.cores = nn.ParameterList(cores)
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        cores = list(self.cores)
        rows = x.numel() // self.in_features
        if dense_is_cheaper(self.shape, rows):
            return nn.functional.linear(x, densify(cores, self.shape), self.bias)
        y = apply(x, cores, self.shape)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """Sizes, as torch prints modules."""
        return str(self.shape)


#: Costs in multiplications, eyeballed from timings of both routes (one thread, x86-64, 576² to 2048²): writing an
#: element of W and adding the terms to it; carrying an element of x or y through a branch that transposes it; the
#: call of a branch. Only the choice of the route depends on them, never a result.
_BUILD, _CARRY, _CALL = 30, 64, 1_000_000


def dense_is_cheaper(shape: MixTShape, rows: int) -> bool:
    """Whether building W once and multiplying ``rows`` rows by it costs less than ``rows`` rows branch by branch."""
    dense = shape.in_features * shape.out_features * (rows + _BUILD)
    carried = rows * (shape.wide_in + shape.wide_out) * shape.terms
    return dense < rows * shape.macs + _CARRY * carried + _CALL * shape.terms


class _Densify(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shape: MixTShape, *cores: torch.Tensor) -> torch.Tensor:
        ctx.shape = shape
        wide = cores[0].new_zeros(shape.wide_out, shape.wide_in)
        for core, split in zip(cores, shape.splits, strict=True):
            for copy in _copies(wide, shape, split):
                copy.add_(core, alpha=shape.scale)
        return wide[: shape.out_features, : shape.in_features]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        shape: MixTShape = ctx.shape
        height, width = shape.wide_out - shape.out_features, shape.wide_in - shape.in_features
        wide = nn.functional.pad(gradient, (0, width, 0, height)) if height or width else gradient.contiguous()
        traces = [
            _trace(wide, shape, split) if needed else None
            for split, needed in zip(shape.splits, ctx.needs_input_grad[1:], strict=True)
        ]
        return (None, *traces)


class _Branches(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shape: MixTShape, x: torch.Tensor, *cores: torch.Tensor) -> torch.Tensor:
        ctx.shape = shape
        ctx.save_for_backward(x, *cores)
        wide = _pad(x, shape.wide_in)
        return _sum_of_terms(wide, list(cores), shape)[:, : shape.out_features]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        shape: MixTShape = ctx.shape
        x, *cores = ctx.saved_tensors
        wide = _pad(gradient, shape.wide_out)
        dx = None
        if ctx.needs_input_grad[1]:
            dx = _sum_of_terms(wide, [core.mT for core in cores], shape)[:, : shape.in_features]
        padded = _pad(x, shape.wide_in)
        traces = [
            (_slices(wide, split).mT @ _slices(padded, split)).mul_(shape.scale) if needed else None
            for split, needed in zip(shape.splits, ctx.needs_input_grad[2:], strict=True)
        ]
        return (None, dx, *traces)


def _sum_of_terms(x: torch.Tensor, cores: Sequence[torch.Tensor], shape: MixTShape) -> torch.Tensor:
    """scale · Σ_k (I ⊗ core_k ⊗ I) x for x (rows, width); cores map width/S to another width/S."""
    rows, width = len(x), cores[0].shape[0]
    y = x.new_zeros(rows, width * shape.spectators)
    for core, (a, c) in zip(cores, shape.splits, strict=True):
        term = (_slices(x, (a, c)) @ core.mT).view(rows * a, c, width).mT
        y.view(rows * a, width, c).add_(term, alpha=shape.scale)
    return y


def _slices(x: torch.Tensor, split: tuple[int, int]) -> torch.Tensor:
    """x (rows, a·w·c) as (rows·a·c, w): one row per spectator slice; a copy unless c is 1."""
    a, c = split
    width = x.shape[1] // (a * c)
    return x.reshape(len(x) * a, width, c).mT.reshape(len(x) * a * c, width)


def _copies(wide: torch.Tensor, shape: MixTShape, split: tuple[int, int]) -> Iterator[torch.Tensor]:
    """Where a term's core stands in ``wide`` (out', in'): S views (out'/S, in'/S).

    One view after the other, not one view with two more axes: torch walks such short inner axes ten times slower.
    """
    (a, c), (height, width) = split, shape.core_shape
    parts = wide.view(a, height, c, a, width, c)
    for left in range(a):
        for right in range(c):
            yield parts[left, :, right, left, :, right]


def _trace(wide: torch.Tensor, shape: MixTShape, split: tuple[int, int]) -> torch.Tensor:
    """scale · the sum of a term's copies in ``wide``: (out'/S, in'/S)."""
    total = wide.new_zeros(shape.core_shape)
    for copy in _copies(wide, shape, split):
        total.add_(copy)
    return total.mul_(shape.scale)


def _pad(x: torch.Tensor, width: int) -> torch.Tensor:
    """Zeros appended to the last axis up to ``width``, contiguous."""
    missing = width - x.shape[-1]
    return nn.functional.pad(x, (0, missing)) if missing else x.contiguous()


def _view(branch: Branch) -> tuple[int, int]:
    """(a, c) of a branch that applies one matrix to the middle of (a, w, c), or (0, 0)."""
    if len(branch.cores) != 1 or len(branch.in_modes) != 3 or len(branch.out_modes) != 3:
        return 0, 0
    (left, middle, right), (above, made, below) = branch.in_modes, branch.out_modes
    if (left, right) != (above, below) or branch.cores[0].labels != (made[0], middle[0]):
        return 0, 0
    return left[1], right[1]


def _power(features: int, bond: int) -> int:
    """Smallest power of ``bond`` that is at least ``features``."""
    power = 1
    while power < features:
        power *= bond
    return power
