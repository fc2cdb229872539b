"""Blocks of integers along the input features of a matrix, and the bytes in which runtimes read them.

A matrix is (N, K) here: outputs by inputs, whatever the layout in which a graph holds it. Codes are unsigned with the
zero in the middle of their range (8 of 16, 128 of 256), as com.microsoft::MatMulNBits takes them without zero points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixt_export.errors import MixtError

Codes = NDArray[np.uint8]
Scales = NDArray[np.float32]

#: Rows whose float64 copies are held at once.
_ROWS = 1024


@dataclass(frozen=True)
class Blocks:
    """``codes`` (N, K) uint8, ``scales`` (N, ceil(K / group)) float32: value = (code - 2^(bits-1)) · scale."""

    codes: Codes
    scales: Scales
    bits: int
    group: int

    def __post_init__(self) -> None:
        rows, columns = self.codes.shape
        if self.scales.shape != (rows, count(columns, self.group)):
            raise MixtError(
                f"{self.scales.shape} scales for ({rows}, {columns}) codes in groups of {self.group}. "
                "Please report this."
            )


def count(columns: int, group: int) -> int:
    """Blocks in ``columns`` inputs; the last one may be short."""
    return -(-columns // group)


def zero_point(bits: int) -> int:
    """The code of 0."""
    return 1 << (bits - 1)


def dequantised(blocks: Blocks) -> NDArray[np.float32]:
    """(N, K) float32: each product of an integer and a scale rounded once, as kernels do."""
    return signed(blocks).astype(np.float32) * spread(blocks.scales, blocks)


def signed(blocks: Blocks) -> NDArray[np.int16]:
    """(N, K) int16: codes less the zero point."""
    return blocks.codes.astype(np.int16) - np.int16(zero_point(blocks.bits))


def spread(scales: Scales, blocks: Blocks) -> NDArray[np.float32]:
    """(N, K): the scale of every element."""
    wide: NDArray[np.float32] = np.repeat(scales, blocks.group, axis=1)[:, : blocks.codes.shape[1]]
    return wide


def stacked(parts: Sequence[Blocks]) -> Blocks:
    """Blocks of a matrix whose rows ``parts`` have, one after the other; of equal width, bits and group."""
    codes, scales = (np.concatenate(arrays) for arrays in zip(*((p.codes, p.scales) for p in parts), strict=True))
    return Blocks(codes, scales, parts[0].bits, parts[0].group)


def distance(blocks: Blocks, matrix: NDArray[Any]) -> dict[str, float]:
    """How far ``blocks`` are from the (N, K) floats they stand for.

    ``error``: Frobenius norm of the difference over that of ``matrix``. ``steps``: largest difference of an element in
    units of its scale: 0.5 where all is rounded to nearest and nothing is cut off. Computed in float64, row by row.
    """
    error = norm = steps = 0.0
    for begin in range(0, len(matrix), _ROWS):
        rows = slice(begin, begin + _ROWS)
        part = Blocks(blocks.codes[rows], blocks.scales[rows], blocks.bits, blocks.group)
        exact = np.asarray(matrix[rows], np.float64)
        apart = dequantised(part) - exact
        error += float(np.square(apart).sum())
        norm += float(np.square(exact).sum())
        scale = np.abs(spread(part.scales, part)).astype(np.float64)
        ratio = np.divide(np.abs(apart), scale, out=np.zeros_like(apart), where=scale > 0)
        steps = max(steps, float(ratio.max(initial=0.0)))
    return {"error": (error / norm) ** 0.5 if norm else 0.0, "steps": steps}


def nbytes(rows: int, columns: int, bits: int, group: int, scale: int = 4) -> tuple[int, int]:
    """Bytes of the packed codes and of the scales, of ``scale`` bytes each, of an (N, K) matrix."""
    blocks = count(columns, group)
    return rows * blocks * (group * bits // 8), rows * blocks * scale


def packed_nbits(blocks: Blocks) -> Codes:
    """(N, ceil(K / group), group · bits / 8) uint8, the operand B of MatMulNBits: the first code in the low bits.

    A short last block is filled with zeros (codes of the zero point). Source: operator com.microsoft::MatMulNBits.
    """
    rows, columns = blocks.codes.shape
    full = count(columns, blocks.group) * blocks.group
    codes: Codes = np.full((rows, full), zero_point(blocks.bits), np.uint8)
    codes[:, :columns] = blocks.codes
    if blocks.bits == 4:
        codes = (codes[:, 0::2] | (codes[:, 1::2] << 4)).astype(np.uint8)
    return codes.reshape(rows, full // blocks.group, -1)


def unpacked_nbits(packed: Codes, scales: Scales, columns: int, bits: int, group: int) -> Blocks:
    """The blocks that `packed_nbits` wrote; ``packed`` of any shape (N, ...)."""
    rows = len(packed)
    codes = packed.reshape(rows, -1)
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(rows, -1)
    return Blocks(np.ascontiguousarray(codes[:, :columns]), scales.reshape(rows, -1), bits, group)


def packed_tensor(blocks: Blocks, *, transposed: bool) -> NDArray[Any]:
    """Signed codes in the order of an ONNX tensor: int8, or uint8 with two INT4 in a byte, the first in the low half.

    (N, K) row by row, or with ``transposed`` (K, N).
    """
    values = signed(blocks).astype(np.int8)
    values = np.ascontiguousarray(values.T) if transposed else values
    if blocks.bits == 8:
        return values
    nibbles = values.reshape(-1).view(np.uint8) & 15
    if len(nibbles) % 2:
        nibbles = np.append(nibbles, np.uint8(0))
    pairs: NDArray[Any] = nibbles[0::2] | (nibbles[1::2] << 4)
    return pairs


def unpacked_tensor(
    packed: NDArray[Any], scales: Scales, shape: tuple[int, int], bits: int, group: int, *, transposed: bool
) -> Blocks:
    """The blocks of an (N, K) = ``shape`` matrix that `packed_tensor` wrote; ``scales`` in the layout of its codes."""
    flat: Codes = packed.reshape(-1).view(np.uint8)
    if bits == 4:
        flat = np.stack([flat & 15, flat >> 4], axis=-1).reshape(-1)[: shape[0] * shape[1]]
        flat = flat ^ np.uint8(8)  # signed nibble -> code
    else:
        flat = flat ^ np.uint8(128)
    codes = flat.reshape(shape[::-1] if transposed else shape)
    if transposed:
        codes, scales = codes.T, scales.T
    scales = scales.reshape(shape[0], -1)  # of one scale a row there is but one axis
    return Blocks(np.ascontiguousarray(codes), np.ascontiguousarray(scales), bits, group)
