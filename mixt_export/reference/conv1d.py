"""transformers' Conv1D (GPT-2): a linear layer whose weight is stored (in, out)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def is_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is one; told by its name, so that transformers need not be imported."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "nx")


def features_of(module: nn.Module) -> tuple[int | None, int | None]:
    """(in, out) features of a linear layer of either kind; (None, None) of anything else."""
    known: Any = module
    if is_conv1d(module):
        return int(known.nx), int(known.nf)
    return getattr(known, "in_features", None), getattr(known, "out_features", None)


def make_linear(model: nn.Module) -> frozenset[str]:
    """Put an nn.Linear in the place of every Conv1D of ``model``, on the meta device and without values.

    Returns the names of the parameters that are stored transposed to what the module now holds.
    """
    found = {name: module for name, module in model.named_modules() if is_conv1d(module)}
    for name, module in found.items():
        inputs, outputs = features_of(module)
        assert inputs is not None and outputs is not None  # is_conv1d
        with torch.device("meta"):
            linear = nn.Linear(inputs, outputs, dtype=next(module.parameters()).dtype)
        model.set_submodule(name, linear.eval().requires_grad_(False))
    return frozenset(f"{name}.weight" for name in found)
