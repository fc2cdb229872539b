"""What a run that replaces block after block leaves: IR, cores and changed vectors on disk, errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from mixt_export.checkpoints import NewTensor
from mixt_export.checkpoints.dtypes import numpy_dtype
from mixt_export.compression.job import Job
from mixt_export.compression.report import LayerReport
from mixt_export.compression.scratch import Scratch
from mixt_export.compression.tensor_mixture.replacements import Replacement
from mixt_export.network import FactorizedLinear
from mixt_export.reference.tensors import torch_dtype


class Made:
    """Cores and changed vectors stay in ``scratch`` until they are written.

    ``describe`` gives the fields of a LayerReport that only the method knows (rank, terms …).
    """

    def __init__(self, job: Job, scratch: Scratch, describe: Callable[[FactorizedLinear], Mapping[str, Any]]) -> None:
        self.job, self.scratch, self.describe = job, scratch, describe
        self.factors: dict[str, FactorizedLinear] = {}
        self.tensors: list[NewTensor] = []
        self.errors: dict[str, float] = {}
        self.low_rank_params = 0

    def finish(
        self, index: int, original: nn.Module, block: nn.Module, replacements: Mapping[str, Replacement]
    ) -> None:
        """Round what is new in ``block`` to its stored dtype and keep it."""
        path, store = self.job.model.block_path(index), self.job.checkpoint.store
        for found in replacements.values():
            name = found.linear.name
            bias = store[f"{name}.bias"].ref if f"{name}.bias" in store else None
            linear = replace(found.linear, bias=None)
            self.factors[name] = replace(linear, bias=bias)
            self.errors[name] = found.error
            for tensor in linear.tensors():
                if tensor.name in found.indices:
                    self._put(tensor.name, tensor.dtype, found.indices[tensor.name])
                else:
                    self._keep(tensor.name, tensor.dtype, found.parameters[tensor.name])
        before = dict(original.named_parameters())
        for inside, parameter in block.named_parameters():
            if inside in before and not torch.equal(parameter, before[inside]):
                name = f"{path}.{inside}"
                self._keep(name, store[name].ref.dtype, parameter)

    def count(
        self, _index: int, _original: nn.Module, _block: nn.Module, replacements: Mapping[str, Replacement]
    ) -> None:
        """Round the low rank control as the compressed model is, and count its parameters."""
        for found in replacements.values():
            self.low_rank_params += parameters_of(found.linear)
            for tensor in found.linear.core_tensors():
                _round(found.parameters[tensor.name], self.job.dtype(found.linear.name))

    def layers(self) -> tuple[LayerReport, ...]:
        """The report of every linear, in the order of the targets."""
        found = []
        for name in self.job.targets:
            linear = self.factors[name]
            dense, params = linear.out_features * linear.in_features, parameters_of(linear)
            found.append(
                LayerReport(
                    name,
                    linear.out_features,
                    linear.in_features,
                    linear.method,
                    params,
                    params / dense,
                    self.errors[name],
                    **self.describe(linear),
                )
            )
        return tuple(found)

    def _keep(self, name: str, dtype: str, parameter: nn.Parameter) -> None:
        _round(parameter, dtype)
        self._put(name, dtype, parameter.detach())

    def _put(self, name: str, dtype: str, values: torch.Tensor) -> None:
        self.scratch.put(name, values.numpy())

        def produce() -> np.ndarray[Any, Any]:
            return self.scratch.get(name).astype(numpy_dtype(dtype))

        self.tensors.append(NewTensor(name, dtype, tuple(values.shape), produce))


def parameters_of(linear: FactorizedLinear) -> int:
    """Parameters without the bias, which the dense linear has too."""
    return replace(linear, bias=None).params


def _round(parameter: nn.Parameter, dtype: str) -> None:
    """To what ``dtype`` stores, in place: what runs on through the model is what will be loaded."""
    parameter.data.copy_(parameter.data.to(torch_dtype(dtype)).float())
