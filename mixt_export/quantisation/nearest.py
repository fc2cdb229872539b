"""Rounding to nearest: each block's scale is the one of a few candidates that loses least."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from mixt_export.checkpoints.dtypes import numpy_dtype
from mixt_export.quantisation.blocks import Blocks, count, zero_point

#: Candidates: the element of largest magnitude reaches the end of the range, or is cut off by up to so much.
_SHRINK = {4: (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76, 0.72), 8: (1.0,)}
#: Elements of a piece that is worked on at once.
_PIECE = 1 << 21


def nearest(
    matrix: NDArray[Any], bits: int, group: int, importance: NDArray[Any] | None = None, *, scale_dtype: str = ""
) -> Blocks:
    """Blocks of ``matrix`` (N, K) with every element rounded to the nearest code of its block's scale.

    ``importance`` (K,): how much the square of an error in each input counts, all the same by default. ``scale_dtype``:
    scales are positive and exact in that dtype.
    """
    rows, columns = matrix.shape
    codes = np.empty((rows, columns), np.uint8)
    scales = np.empty((rows, count(columns, group)), np.float32)
    step = max(_PIECE // max(columns, 1), 1)
    for begin in range(0, rows, step):
        part = np.asarray(matrix[begin : begin + step], np.float32)
        found = best_scales(part, bits, group, importance, positive=bool(scale_dtype))
        found = representable(found, scale_dtype) if scale_dtype else found
        scales[begin : begin + step] = found
        codes[begin : begin + step] = rounded(part, found, bits, group)
    return Blocks(codes, scales, bits, group)


def best_scales(
    matrix: NDArray[np.float32],
    bits: int,
    group: int,
    importance: NDArray[Any] | None = None,
    *,
    positive: bool = False,
) -> NDArray[np.float32]:
    """(N, ceil(K / group)) float32: per block the candidate with the least weighted square error.

    A scale may be negative: then the largest magnitude meets the end of the range that reaches one further (-8 of
    -8 … 7), unless ``positive``.
    """
    blocks = blocked(matrix, group)
    weight = None if importance is None else blocked(np.asarray(importance, np.float32)[None], group)
    low, high = zero_point(bits), zero_point(bits) - 1
    place = np.abs(blocks).argmax(axis=-1)[..., None]
    extreme = np.take_along_axis(blocks, place, axis=-1)[..., 0]
    best = np.zeros_like(extreme)
    least = np.full(extreme.shape, np.inf, np.float32)
    for end in (-low, high):
        for shrink in _SHRINK[bits]:
            scale = extreme * np.float32(shrink / end)
            scale = np.abs(scale) if positive else scale
            error = blocks - _steps(blocks, scale[..., None], bits) * scale[..., None]
            error *= error
            loss = (error if weight is None else error * weight).sum(axis=-1)
            better = loss < least
            best[better], least[better] = scale[better], loss[better]
    return best


def representable(scales: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Positive ``scales`` rounded to ``dtype``, none of them to zero: the least is the smallest normal number."""
    kind = numpy_dtype(dtype)
    least = float(ml_dtypes.finfo(kind).smallest_normal)
    found: NDArray[np.float32] = np.maximum(np.abs(scales), least).astype(kind).astype(np.float32)
    return found


def rounded(matrix: NDArray[np.float32], scales: NDArray[np.float32], bits: int, group: int) -> NDArray[np.uint8]:
    """Codes (N, K) of ``matrix`` (N, K) at ``scales`` (N, blocks)."""
    blocks = blocked(matrix, group)
    steps = _steps(blocks, scales[..., None], bits) + zero_point(bits)
    return steps.astype(np.uint8).reshape(len(matrix), -1)[:, : matrix.shape[1]]


def blocked(matrix: NDArray[np.float32], group: int) -> NDArray[np.float32]:
    """(N, K) -> (N, ceil(K / group), group), a short last block filled with zeros."""
    rows, columns = matrix.shape
    full = count(columns, group) * group
    padded = matrix if full == columns else np.pad(matrix, ((0, 0), (0, full - columns)))
    return padded.reshape(rows, full // group, group)


def _steps(blocks: NDArray[np.float32], scale: NDArray[np.float32], bits: int) -> NDArray[np.float32]:
    """``blocks`` in units of ``scale``, rounded half to even and cut off at the ends; 0 where the scale is 0."""
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)
    found: NDArray[np.float32] = np.clip(np.rint(blocks * inverse), -zero_point(bits), zero_point(bits) - 1)
    return found
