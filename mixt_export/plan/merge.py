"""The matrix of a window, made from the stored cores."""

from __future__ import annotations

from typing import Any

import numpy as np

from mixt_export.plan.mixture import Load, Mixture
from mixt_export.plan.windows import Window


def merged(mixture: Mixture, window: Window, load: Load) -> np.ndarray[Any, Any]:
    """scale · M as float64 (``window.rows``, ``window.columns``), M = Σ_m I_(d^m) ⊗ T ⊗ I_(d^(j-1-m)), cropped.

    ``load(name)`` gives a core in its stored layout, in any float dtype. One core is in memory beside the result.
    """
    rows, columns = mixture.core_shape
    bond, count = mixture.bond, window.count
    size = bond ** (count - 1)
    result = np.zeros((rows * size, columns * size))
    for position in range(count):
        term = mixture.terms[window.first + position]
        core = load(term.tensor).astype(np.float64) * mixture.scale
        core = core.T if term.stored_transposed else core
        left, right = bond**position, bond ** (count - 1 - position)
        blocks = result.reshape(left, rows, right, left, columns, right)
        for outer in range(left):
            for inner in range(right):
                blocks[outer, :, inner, outer, :, inner] += core
    return result[: window.rows, : window.columns]
