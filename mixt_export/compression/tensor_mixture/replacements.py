"""What can stand in the place of a linear: MixT, the low rank factors it is compared with, nothing at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from mixt_export.compression.closed_form import damped, decompose, regressed
from mixt_export.compression.settings import Settings
from mixt_export.compression.tensor_mixture.closed_form import fit, match
from mixt_export.compression.tensor_mixture.moments import Moments
from mixt_export.network import FactorizedLinear, TensorRef, build
from mixt_export.reference.linear import linear_module
from mixt_export.reference.tensor_mixture import MixTShape, densify


@dataclass(frozen=True)
class Replacement:
    """``linear``: the IR; ``parameters``: its tensors by name, float32, trained in place; ``error``: see Moments.

    ``indices``: rows and columns of a sparse residual by name, int64.
    """

    linear: FactorizedLinear
    parameters: Mapping[str, nn.Parameter]
    error: float
    indices: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def module(self) -> nn.Module:
        """The module that executes ``linear`` with ``parameters``."""
        return linear_module(self.linear, self.parameters.__getitem__, self.indices.__getitem__)


Solve = Callable[[str, nn.Linear, Moments], Replacement]
"""Module path, the original, moments of what it should do -> what replaces it."""


def mixt_solver(linears: Mapping[str, FactorizedLinear], settings: Settings) -> Solve:
    """MixT of the sizes of ``linears`` (by module path): matched to the weight, then fitted to the moments."""

    def solve(name: str, original: nn.Linear, moments: Moments) -> Replacement:
        linear = linears[name]
        shape = MixTShape.of(linear)
        assert shape is not None
        start = match(original.weight.detach(), shape)
        cores = fit(
            moments.cross,
            moments.gram,
            shape,
            ridge=settings.term_ridge,
            sweeps=settings.term_sweeps,
            start=start,
        )
        error = moments.error(densify(cores, shape))
        return replacement(linear, original, cores, error)

    return solve


def low_rank_solver(params: Mapping[str, int], settings: Settings) -> Solve:
    """Low rank of at most ``params`` parameters (by module path; rank 1 at least): the anchored closed form."""

    def solve(name: str, original: nn.Linear, moments: Moments) -> Replacement:
        weight = original.weight.detach()
        out_features, in_features = weight.shape
        rank = max(1, min(params[name] // (out_features + in_features), out_features, in_features))
        gram = moments.gram
        target = regressed(weight, moments.cross, gram, settings.anchor_damping)
        found = decompose(target, damped(gram, settings.anchor_damping), None, rank)
        up, down = found.up[:, :rank], found.down[:rank]
        linear = build.low_rank(name, in_features, out_features, rank)
        return replacement(linear, original, [down.T, up.T], moments.error(up @ down))

    return solve


def replacement(
    linear: FactorizedLinear,
    original: nn.Linear,
    cores: Sequence[torch.Tensor],
    error: float,
    residual: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> Replacement:
    """``cores`` in the order of the IR's core tensors, and the bias of ``original`` if it has one.

    ``residual``: rows, columns (nnz,) int64 and values (nnz,) of the sparse residual of ``linear``, where it has one.
    """
    names = [tensor.name for tensor in linear.core_tensors()]
    parameters = {name: _parameter(core) for name, core in zip(names, cores, strict=True)}
    if original.bias is not None:
        bias = TensorRef(f"{linear.name}.bias", (linear.out_features,), "float32")
        linear = replace(linear, bias=linear.bias or bias)
        parameters[bias.name] = _parameter(original.bias.detach())
    if linear.sparse is None or residual is None:
        return Replacement(linear, parameters, error)
    rows, columns, values = residual
    parameters[linear.sparse.values.name] = _parameter(values)
    return Replacement(linear, parameters, error, {linear.sparse.rows.name: rows, linear.sparse.cols.name: columns})


def _parameter(values: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(values.float().clone().contiguous(), requires_grad=False)
