"""What can stand in the place of a linear: MixT, the low rank factors it is compared with, nothing at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

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
    """``linear``: the IR; ``parameters``: its tensors by name, float32, trained in place; ``error``: see Moments."""

    linear: FactorizedLinear
    parameters: Mapping[str, nn.Parameter]
    error: float

    def module(self) -> nn.Module:
        """The module that executes ``linear`` with ``parameters``."""
        return linear_module(self.linear, self.parameters.__getitem__, self._no_index)

    def _no_index(self, name: str) -> torch.Tensor:
        raise KeyError(name)  # none of these has a sparse residual


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
        return _replacement(linear, original, cores, error)

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
        return _replacement(linear, original, [down.T, up.T], moments.error(up @ down))

    return solve


def _replacement(linear: FactorizedLinear, original: nn.Linear, cores: list[torch.Tensor], error: float) -> Replacement:
    """``cores`` in the order of the IR's core tensors, and the bias of ``original`` if it has one."""
    names = [tensor.name for tensor in linear.core_tensors()]
    parameters = {name: _parameter(core) for name, core in zip(names, cores, strict=True)}
    if original.bias is not None:
        bias = TensorRef(f"{linear.name}.bias", (linear.out_features,), "float32")
        linear = replace(linear, bias=linear.bias or bias)
        parameters[bias.name] = _parameter(original.bias.detach())
    return Replacement(linear, parameters, error)


def _parameter(values: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(values.float().clone().contiguous(), requires_grad=False)
