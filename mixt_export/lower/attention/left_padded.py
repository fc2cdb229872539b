"""What the TensorRT dialects share: left-padded batches, keys and values joined by Concat, masks from float32 indices.

Counting and comparing is done in float32, exact for lengths below 2^24: TensorRT 10.3 reduces and accumulates floats
only. The mask must be 0…01…1 per row, as left padding makes it.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from mixt_export.families.wiring import Rope
from mixt_export.lower.attention.interface import Cache, Inputs, int64
from mixt_export.lower.builder import Dim
from mixt_export.lower.precision import WIDE, Precision, dims

_INT64, _BOOL = ir.DataType.INT64, ir.DataType.BOOL


class LeftPadded:
    """Positions, masks, rotary tables and the cache of a left-padded batch; the attention itself is the subclass's."""

    packs_qkv = False

    def __init__(self, inputs: Inputs) -> None:
        self._in = inputs
        self.precision: Precision = inputs.precision
        b, one = inputs.builder, inputs.builder.constant(int64(1), "one")
        seq, total = self._width(inputs.input_ids, "seq"), self._width(inputs.attention_mask, "total")
        past = b.op("Sub", [total, seq], name="/attention/past", dtype=_INT64, shape=[1])
        self._keys = self._range(None, total, "keys", "total")
        queries = self._range(past, total, "queries", "seq")
        self._queries = b.op("Unsqueeze", [queries, one], name="/attention/query_column", dtype=WIDE, shape=["seq", 1])
        marks = b.op(
            "Cast", [inputs.attention_mask], name="/attention/marks", dtype=WIDE, shape=["batch", "total"], to=WIDE
        )
        self._positions = self._count_positions(marks, total, queries)
        self._mask = self._causal_mask(marks)
        self._windowed: dict[int, ir.Value] = {}

    def last_position(self, hidden: ir.Value, node: str) -> ir.Value:
        """Left padding puts every sequence's last token at the end."""
        b = self._in.builder
        bounds = [b.constant(int64(v), n) for v, n in ((-1, "minus_one"), (np.iinfo(np.int64).max, "end"), (1, "one"))]
        batch, _, features = dims(hidden)
        return b.op("Slice", [hidden, *bounds], name=node, dtype=_dtype(hidden), shape=[batch, 1, features])

    def positions(self) -> ir.Value:
        """See Attention.positions."""
        return self._positions

    def tables(self, rope: Rope) -> tuple[ir.Value, ir.Value]:
        """Cosines and sines of every position, float32 (max_seq_len, rotary_dim / 2)."""
        return self._in.rotary_tables(rope, WIDE)

    def heads_apart(self, x: ir.Value, count: int, node: str, *, transpose: bool = True) -> ir.Value:
        """(batch, seq, count · head_dim) -> (batch, count, seq, head_dim), or (batch, seq, count, head_dim)."""
        b, dim = self._in.builder, self._in.decoder.head_dim
        sizes = b.constant(int64(0, 0, count, dim), f"split_{count}_heads")
        apart = b.op("Reshape", [x, sizes], name=f"{node}/heads", dtype=_dtype(x), shape=["batch", "seq", count, dim])
        return self.swapped(apart, node) if transpose else apart

    def swapped(self, x: ir.Value, node: str) -> ir.Value:
        """(batch, seq, heads, head_dim) -> (batch, heads, seq, head_dim)."""
        batch, seq, heads, dim = dims(x)
        shape: list[Dim] = [batch, heads, seq, dim]
        return self._in.builder.op(
            "Transpose", [x], name=f"{node}/by_head", dtype=_dtype(x), shape=shape, perm=[0, 2, 1, 3]
        )

    def joined(self, past: Cache, key: ir.Value, value: ir.Value, node: str) -> Cache:
        """Past and new keys and values, (batch, kv_heads, total, head_dim), in the cache's dtype."""
        d, b = self._in.decoder, self._in.builder
        shape: list[Dim] = ["batch", d.kv_heads, "total", d.head_dim]
        parts = ((past.key, key, "present_key"), (past.value, value, "present_value"))
        return Cache(
            *(
                b.op(
                    "Concat", [old, self.precision.narrow(new)], name=f"{node}/{name}", dtype=self.precision.dtype,
                    shape=shape, axis=2,
                )
                for old, new, name in parts
            )
        )  # fmt: skip

    def mask_of(self, window: int | None) -> ir.Value:
        """Which keys a query sees, bool (batch, 1, seq, total): causal, valid, and query - key < window."""
        if window is None:
            return self._mask
        if window not in self._windowed:
            b, prefix = self._in.builder, f"/attention/window_{window}"
            width = b.constant(np.array(window, np.float32), f"window_{window}")
            oldest = b.op("Sub", [self._queries, width], name=f"{prefix}/oldest", dtype=WIDE, shape=["seq", 1])
            near = b.op("Less", [oldest, self._keys], name=f"{prefix}/near", dtype=_BOOL, shape=["seq", "total"])
            shape: list[Dim] = ["batch", 1, "seq", "total"]
            self._windowed[window] = b.op("And", [self._mask, near], name=f"{prefix}/mask", dtype=_BOOL, shape=shape)
        return self._windowed[window]

    def _width(self, x: ir.Value, name: str) -> ir.Value:
        """Number of columns of ``x`` (rows, columns), as a vector of one; old parsers know no part of Shape."""
        b = self._in.builder
        sizes = b.op("Shape", [x], name=f"/attention/{name}_shape", dtype=_INT64, shape=[2])
        return b.op("Gather", [sizes, b.constant(int64(1), "one")], name=f"/attention/{name}", dtype=_INT64, shape=[1])

    def _range(self, start: ir.Value | None, end: ir.Value, name: str, size: str) -> ir.Value:
        """Indices start … end - 1 as float32."""
        b = self._in.builder
        first, step = (b.constant(np.array(v, np.int64), f"scalar_{v}") for v in (0, 1))
        axis = b.constant(int64(0), "zero")
        if start is not None:
            first = b.op("Squeeze", [start, axis], name=f"/attention/{name}_start", dtype=_INT64, shape=[])
        last = b.op("Squeeze", [end, axis], name=f"/attention/{name}_end", dtype=_INT64, shape=[])
        whole = b.op("Range", [first, last, step], name=f"/attention/{name}_index", dtype=_INT64, shape=[size])
        return b.op("Cast", [whole], name=f"/attention/{name}", dtype=WIDE, shape=[size], to=WIDE)

    def _count_positions(self, marks: ir.Value, total: ir.Value, queries: ir.Value) -> ir.Value:
        """Position of every new token, int64 (batch, seq): its index less the padding before it, at least 0."""
        b = self._in.builder
        count = b.op(
            "ReduceSum", [marks, b.constant(int64(1), "one")], name="/position/count", dtype=WIDE, shape=["batch", 1],
            keepdims=1,
        )  # fmt: skip
        length = b.op("Cast", [total], name="/position/length", dtype=WIDE, shape=[1], to=WIDE)
        padding = b.op("Sub", [length, count], name="/position/padding", dtype=WIDE, shape=["batch", 1])
        grid: list[Dim] = ["batch", "seq"]
        shifted = b.op("Sub", [queries, padding], name="/position/shift", dtype=WIDE, shape=grid)
        zero = b.constant(np.array(0, np.float32), "float_zero")
        clipped = b.op("Max", [shifted, zero], name="/position/clip", dtype=WIDE, shape=grid)
        return b.op("Cast", [clipped], name="/position/ids", dtype=_INT64, shape=grid, to=_INT64)

    def _causal_mask(self, marks: ir.Value) -> ir.Value:
        b = self._in.builder
        grid: list[Dim] = ["seq", "total"]
        causal = b.op("LessOrEqual", [self._keys, self._queries], name="/attention/causal", dtype=_BOOL, shape=grid)
        # A padded query sees itself and nothing else: a row without any key would be 0/0, and its NaN would spread.
        itself = b.op("Equal", [self._keys, self._queries], name="/attention/itself", dtype=_BOOL, shape=grid)
        wide: list[Dim] = ["batch", 1, 1, "total"]
        rows = b.op(
            "Unsqueeze", [marks, b.constant(int64(1, 2), "axes_1_2")], name="/attention/mask_rows", dtype=WIDE,
            shape=wide,
        )  # fmt: skip
        valid = b.op("Cast", [rows], name="/attention/valid", dtype=_BOOL, shape=wide, to=_BOOL)
        full: list[Dim] = ["batch", 1, "seq", "total"]
        usable = b.op("Or", [valid, itself], name="/attention/usable", dtype=_BOOL, shape=full)
        return b.op("And", [usable, causal], name="/attention/mask", dtype=_BOOL, shape=full)


def _dtype(x: ir.Value) -> ir.DataType:
    assert x.dtype is not None  # the builder gives every value a dtype
    return x.dtype
