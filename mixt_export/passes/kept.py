"""Tensors that a pass made, on disk while its result is used."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixt_export.checkpoints import Made


def kept(values: NDArray[Any], path: Path) -> Made:
    """Write ``values`` to ``path``, an .npy file; the virtual tensor that reads them from there."""
    np.save(path, values, allow_pickle=False)
    return Made(str(values.dtype), values.shape, partial(_load, path))


def _load(path: Path) -> NDArray[Any]:
    values: NDArray[Any] = np.load(path, allow_pickle=False)
    return values
