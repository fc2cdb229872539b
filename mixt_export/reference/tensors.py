"""Stored tensors as torch tensors."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch

from mixt_export.checkpoints import TensorStore
from mixt_export.errors import UsageError

#: dtype names as everywhere in the package -> torch dtypes a model can be run in.
TORCH_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype called ``name``. Raises UsageError for one that models are not run in."""
    if name not in TORCH_DTYPES:
        raise UsageError(f"dtype {name!r} is unknown; choose one of {', '.join(TORCH_DTYPES)}.")
    return TORCH_DTYPES[name]


def to_torch(array: np.ndarray[Any, Any]) -> torch.Tensor:
    """``array`` as a torch tensor that shares its memory; bfloat16 included, which numpy and torch do not exchange."""
    if array.dtype == np.dtype(ml_dtypes.bfloat16):
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def read_tensor(store: TensorStore, name: str, dtype: str) -> torch.Tensor:
    """Tensor ``name`` of ``store`` converted to ``dtype``. Raises what TensorStore.read raises."""
    return to_torch(store.read(name, dtype))
