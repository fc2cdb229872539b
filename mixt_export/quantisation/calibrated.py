"""Rounding by what a matrix reads: what one column loses, the others make up for.

The loss of a row is (w - ŵ) H (w - ŵ)ᵀ with H the damped second moments of the inputs. Three steps, each of which
lowers it: columns are rounded one after the other, those of the largest inputs first, each error spread over the
columns still to come (Frantar et al., GPTQ, 2023, Algorithm 1, with the groups' scales fixed before); the scales of a
row are solved for given its codes; single codes move to where the loss is least given all others (coordinate descent).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixt_export.quantisation.blocks import Blocks, count, zero_point
from mixt_export.quantisation.nearest import best_scales, representable

#: Part of the mean second moment that is added to each. Measured on held-out tokens: at less, wide matrices fit the few
#: thousand tokens of a calibration instead of the inputs behind them (docs/quantisation.md).
DAMPING = 0.5
#: How often scales and codes are improved in turn; a second time gained a hundredth of the loss.
ROUNDS = 1
#: Columns whose effect on the others is gathered before it is applied.
_LAZY = 64
#: Elements of the largest intermediate, float64.
_PIECE = 1 << 22

Wide = NDArray[np.float64]


def calibrated(
    matrix: NDArray[Any], gram: Wide, bits: int, group: int, *, damping: float = DAMPING, scale_dtype: str = ""
) -> Blocks:
    """Blocks of ``matrix`` (N, K) that keep ``matrix`` · x for inputs x of second moments ``gram`` (K, K) = Σ x xᵀ.

    ``scale_dtype``: scales are positive and exact in that dtype.
    """
    rows, columns = matrix.shape
    moments = _damped(gram, damping)
    order = np.argsort(-np.diag(moments), kind="stable")
    upper = _inverse_factor(moments[np.ix_(order, order)])
    exact = np.asarray(matrix, np.float64)
    positive = bool(scale_dtype)
    found = best_scales(np.asarray(matrix, np.float32), bits, group, np.diag(moments), positive=positive)
    scales = (representable(found, scale_dtype) if positive else found).astype(np.float64)
    codes = _sweep(exact, upper, order, scales, bits, group)
    step = max(_PIECE // (columns * count(columns, group)), 1)
    for _ in range(ROUNDS):
        for begin in range(0, rows, step):
            part = slice(begin, begin + step)
            solved = _solved_scales(exact[part], moments, codes[part], scales[part], group)
            if positive:
                solved = representable(np.where(solved > 0, solved, scales[part]), scale_dtype).astype(np.float64)
            scales[part] = solved
        codes = _descend(exact, moments, codes, scales, bits, group)
    return Blocks((codes + zero_point(bits)).astype(np.uint8), scales.astype(np.float32), bits, group)


def _damped(gram: Wide, damping: float) -> Wide:
    moments = np.array(gram, np.float64)
    mean = float(np.trace(moments)) / len(moments)
    moments /= mean if mean > 0 else 1.0
    moments[np.diag_indices(len(moments))] += damping if mean > 0 else 1.0
    return moments


def _inverse_factor(moments: Wide) -> Wide:
    """U upper triangular with moments⁻¹ = Uᵀ U."""
    outer = np.linalg.cholesky(moments[::-1, ::-1])[::-1, ::-1]  # outer · outerᵀ = moments
    return np.triu(np.linalg.solve(outer, np.eye(len(outer))))


def _rounded(values: Wide, scale: Wide, bits: int) -> Wide:
    """Nearest codes, signed; 0 where the scale is 0."""
    inverse = np.divide(1.0, scale, out=np.zeros_like(scale), where=scale != 0)
    found: Wide = np.clip(np.rint(values * inverse), -zero_point(bits), zero_point(bits) - 1)
    return found


def _sweep(matrix: Wide, upper: Wide, order: NDArray[np.intp], scales: Wide, bits: int, group: int) -> Wide:
    """Signed codes (N, K), column by column in ``order``; ``upper`` is in that order."""
    left = matrix[:, order]
    codes = np.empty_like(matrix)
    columns = len(order)
    for begin in range(0, columns, _LAZY):
        end = min(begin + _LAZY, columns)
        block = left[:, begin:end].copy()
        errors = np.empty_like(block)
        for offset, position in enumerate(range(begin, end)):
            column = order[position]
            scale = scales[:, column // group]
            code = _rounded(block[:, offset], scale, bits)
            codes[:, column] = code
            error = (block[:, offset] - code * scale) / upper[position, position]
            block[:, offset:] -= error[:, None] * upper[position, position:end]
            errors[:, offset] = error
        left[:, end:] -= errors @ upper[begin:end, end:]
    return codes


def _solved_scales(matrix: Wide, moments: Wide, codes: Wide, scales: Wide, group: int) -> Wide:
    """The scales (N, blocks) with the least loss for signed ``codes`` (N, K): a small linear system for each row."""
    starts = range(0, codes.shape[1], group)
    seen = np.stack([codes[:, at : at + group] @ moments[at : at + group] for at in starts], axis=1)
    system = np.stack([(seen[:, :, at : at + group] * codes[:, None, at : at + group]).sum(-1) for at in starts], -1)
    wanted = (matrix @ moments) * codes
    target = np.stack([wanted[:, at : at + group].sum(-1) for at in starts], -1)
    # A block of zeros only has no say; the ridge keeps its scale finite and moves the others by nothing that counts.
    ridge = 1e-9 * np.trace(system, axis1=1, axis2=2)[:, None, None] / len(starts) + 1e-300
    solved: Wide = np.linalg.solve(system + ridge * np.eye(len(starts)), target[..., None])[..., 0]
    return np.where(np.isfinite(solved) & (solved != 0), solved, scales).astype(np.float32).astype(np.float64)


def _descend(matrix: Wide, moments: Wide, codes: Wide, scales: Wide, bits: int, group: int) -> Wide:
    """One pass over the columns, in place: each code moves to the nearest of its best value given all others."""
    columns = codes.shape[1]
    gradient = (matrix - codes * np.repeat(scales, group, axis=1)[:, :columns]) @ moments
    for begin in range(0, columns, _LAZY):
        end = min(begin + _LAZY, columns)
        inner = gradient[:, begin:end].copy()
        moved = np.empty_like(inner)
        for offset, column in enumerate(range(begin, end)):
            scale = scales[:, column // group]
            best = codes[:, column] * scale + inner[:, offset] / moments[column, column]
            code = _rounded(best, scale, bits)
            moved[:, offset] = (code - codes[:, column]) * scale
            codes[:, column] = code
            inner -= moved[:, offset, None] * moments[column, begin:end]
        gradient -= moved @ moments[begin:end]
    return codes
