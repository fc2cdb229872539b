"""Rotation of queries and keys written out, for dialects without RotaryEmbedding (arXiv:2104.09864, equation 34).

x is (batch, seq, heads, rotary_dim), cos and sin are (batch, seq, 1, rotary_dim / 2); all of one dtype, the result's.
"""

from __future__ import annotations

import onnx_ir as ir

from mixt_export.lower.attention.interface import int64
from mixt_export.lower.builder import Dim, GraphBuilder
from mixt_export.lower.elementwise import type_of
from mixt_export.lower.precision import dims


def rotate_halves(b: GraphBuilder, x: ir.Value, cos: ir.Value, sin: ir.Value, node: str) -> ir.Value:
    """Halves rotate together: y1 = x1 cos - x2 sin, y2 = x2 cos + x1 sin."""
    dtype, (shape, half) = type_of(x), _halved(x)
    sizes = b.constant(int64(half, half), "halves")
    halves = [(dtype, shape), (dtype, shape)]
    first, second = b.ops("Split", [x, sizes], name=f"{node}/halves", outputs=halves, axis=-1)
    low, high = _turned(b, first, second, cos, sin, node)
    return b.op("Concat", [low, high], name=f"{node}/rotated", dtype=dtype, shape=dims(x), axis=-1)


def rotate_neighbours(b: GraphBuilder, x: ir.Value, cos: ir.Value, sin: ir.Value, node: str) -> ir.Value:
    """Entries 2i and 2i + 1 rotate together (GPT-J)."""
    dtype, (shape, half) = type_of(x), _halved(x)
    count = _size(shape[2])
    pair: list[Dim] = [*shape, 2]
    one: list[Dim] = [*shape, 1]
    sizes = b.constant(int64(0, 0, count, half, 2), f"pairs_{count}_{half}")
    pairs = b.op("Reshape", [x, sizes], name=f"{node}/pairs", dtype=dtype, shape=pair)
    last = b.constant(int64(-1), "minus_one")
    columns = []
    for index, name in enumerate(("even", "odd")):
        where = b.constant(int64(index), ("zero", "one")[index])
        column = b.op("Gather", [pairs, where], name=f"{node}/{name}_pair", dtype=dtype, shape=one, axis=-1)
        columns.append(b.op("Squeeze", [column, last], name=f"{node}/{name}", dtype=dtype, shape=shape))
    low, high = _turned(b, columns[0], columns[1], cos, sin, node)
    parts = [
        b.op("Unsqueeze", [part, last], name=f"{node}/{name}_column", dtype=dtype, shape=one)
        for part, name in ((low, "first"), (high, "second"))
    ]
    joined = b.op("Concat", parts, name=f"{node}/rotated_pairs", dtype=dtype, shape=pair, axis=-1)
    full = b.constant(int64(0, 0, count, 2 * half), f"unpaired_{count}_{half}")
    return b.op("Reshape", [joined, full], name=f"{node}/rotated", dtype=dtype, shape=dims(x))


def _halved(x: ir.Value) -> tuple[list[Dim], int]:
    """Shape of each of two halves, and their size."""
    *lead, features = dims(x)
    half = _size(features) // 2
    return [*lead, half], half


def _size(dim: Dim) -> int:
    assert isinstance(dim, int)  # heads and features are never symbolic
    return dim


def _turned(
    b: GraphBuilder, first: ir.Value, second: ir.Value, cos: ir.Value, sin: ir.Value, node: str
) -> tuple[ir.Value, ir.Value]:
    def op(op_type: str, left: ir.Value, right: ir.Value, name: str) -> ir.Value:
        return b.op(op_type, [left, right], name=f"{node}/{name}", dtype=type_of(first), shape=dims(first))

    low = op("Sub", op("Mul", first, cos, "first_cos"), op("Mul", second, sin, "second_sin"), "first")
    high = op("Add", op("Mul", second, cos, "second_cos"), op("Mul", first, sin, "first_sin"), "second")
    return low, high
