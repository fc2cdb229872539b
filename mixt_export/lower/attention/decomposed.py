"""Attention of dialect trt10, written out for opset ≤ 20: rotation, two MatMuls and a softmax in float32."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import onnx_ir as ir

from mixt_export.families.wiring import Block
from mixt_export.lower.attention.interface import Cache, Heads, Inputs, int64
from mixt_export.lower.attention.left_padded import LeftPadded
from mixt_export.lower.builder import Dim
from mixt_export.lower.precision import WIDE, dims

#: Added to the scores of keys that a query may not see. Half of the lowest float32: adding a score cannot overflow.
_HIDDEN = float(np.finfo(np.float32).min) / 2


class DecomposedAttention(LeftPadded):
    """MatMul, Softmax, MatMul. Queries that share a key head are its rows, so keys and values are never repeated.

    The factor head_dim^-0.5 is part of the queries' rotation, so scores leave the first MatMul already small.
    """

    def __init__(self, inputs: Inputs) -> None:
        super().__init__(inputs)
        self._group = inputs.decoder.heads // inputs.decoder.kv_heads
        self._biases: dict[int | None, ir.Value] = {}

    @cached_property
    def _angles(self) -> tuple[list[ir.Value], list[ir.Value]]:
        """Cosine and sine of every new token, float32 (batch, seq, 1, head_dim / 2): for keys, and for queries."""
        b, half = self._in.builder, self._in.decoder.head_dim // 2
        shape: list[Dim] = ["batch", "seq", half]
        apart: list[Dim] = ["batch", "seq", 1, half]
        scale = b.constant(np.array(self._in.decoder.head_dim**-0.5, np.float32), "attention_scale")
        keys, queries = [], []
        for table, name in zip(self.tables(), ("cos", "sin"), strict=True):
            rows = b.op("Gather", [table, self._positions], name=f"/rotary/{name}_rows", dtype=WIDE, shape=shape)
            angles = b.op(
                "Unsqueeze", [rows, b.constant(int64(2), "axis_2")], name=f"/rotary/{name}_of_keys", dtype=WIDE,
                shape=apart,
            )  # fmt: skip
            keys.append(angles)
            queries.append(b.op("Mul", [angles, scale], name=f"/rotary/{name}_of_queries", dtype=WIDE, shape=apart))
        return keys, queries

    def attend(self, block: Block, heads: Heads, past: Cache, node: str) -> tuple[ir.Value, Cache]:
        """See Attention.attend."""
        d, b, cast = self._in.decoder, self._in.builder, self.precision
        assert heads.k is not None and heads.v is not None  # packs_qkv is False
        keys, queries = self._angles
        query = self._turned(heads.q, d.heads, queries, f"{node}/q_rotary")
        key = self._turned(heads.k, d.kv_heads, keys, f"{node}/k_rotary")
        value = self.heads_apart(heads.v, d.kv_heads, f"{node}/v")
        cache = self.joined(past, self.swapped(key, f"{node}/k"), value, node)

        island = block.index in self._in.islands.attention
        dtype, convert = (WIDE, cast.wide) if island else (cast.dtype, cast.narrow)
        rows = self._rows(convert(query), f"{node}/q")
        turned: list[Dim] = ["batch", d.kv_heads, d.head_dim, "total"]
        columns = b.op(
            "Transpose", [convert(cache.key)], name=f"{node}/k_columns", dtype=dtype, shape=turned, perm=[0, 1, 3, 2]
        )
        grid: list[Dim] = ["batch", d.kv_heads, "group_seq", "total"]
        scores = cast.wide(b.op("MatMul", [rows, columns], name=f"{node}/scores", dtype=dtype, shape=grid))
        masked = b.op("Add", [scores, self._bias(block.window)], name=f"{node}/masked", dtype=WIDE, shape=grid)
        soft = cast.narrow(b.op("Softmax", [masked], name=f"{node}/Softmax", dtype=WIDE, shape=grid, axis=-1))
        mixed: list[Dim] = ["batch", d.kv_heads, "group_seq", d.head_dim]
        out = b.op("MatMul", [soft, cache.value], name=f"{node}/mixed", dtype=cast.dtype, shape=mixed)
        return self._together(out, node), cache

    def _turned(self, x: ir.Value, count: int, angles: list[ir.Value], node: str) -> ir.Value:
        """(batch, seq, count · head_dim) -> (batch, seq, count, head_dim), rotated, in the dtype of x.

        Halves rotate together: y1 = x1 cos - x2 sin, y2 = x2 cos + x1 sin (arXiv:2104.09864, equation 34).
        """
        b, cast, half, dtype = self._in.builder, self.precision, self._in.decoder.head_dim // 2, x.dtype
        assert dtype is not None  # the builder gives every value a dtype
        convert = cast.wide if dtype == WIDE else cast.narrow
        cos, sin = (convert(table) for table in angles)
        shape: list[Dim] = ["batch", "seq", count, half]

        def op(op_type: str, left: ir.Value, right: ir.Value, name: str) -> ir.Value:
            return b.op(op_type, [left, right], name=f"{node}/{name}", dtype=dtype, shape=shape)

        apart = self.heads_apart(x, count, node, transpose=False)
        halves = [(dtype, shape), (dtype, shape)]
        sizes = b.constant(int64(half, half), "halves")
        first, second = b.ops("Split", [apart, sizes], name=f"{node}/halves", outputs=halves, axis=-1)
        low = op("Sub", op("Mul", first, cos, "first_cos"), op("Mul", second, sin, "second_sin"), "first")
        high = op("Add", op("Mul", second, cos, "second_cos"), op("Mul", first, sin, "first_sin"), "second")
        return b.op("Concat", [low, high], name=f"{node}/rotated", dtype=dtype, shape=dims(apart), axis=-1)

    def _rows(self, query: ir.Value, node: str) -> ir.Value:
        """(batch, seq, heads, head_dim) -> (batch, kv_heads, group · seq, head_dim), the head of a group first."""
        d, b, dtype = self._in.decoder, self._in.builder, query.dtype
        assert dtype is not None  # the builder gives every value a dtype
        if self._group == 1:
            return self.swapped(query, node)
        sizes = b.constant(int64(0, 0, d.kv_heads, self._group, d.head_dim), "split_groups")
        apart: list[Dim] = ["batch", "seq", d.kv_heads, self._group, d.head_dim]
        grouped = b.op("Reshape", [query, sizes], name=f"{node}/groups", dtype=dtype, shape=apart)
        turned: list[Dim] = ["batch", d.kv_heads, self._group, "seq", d.head_dim]
        moved = b.op("Transpose", [grouped], name=f"{node}/by_group", dtype=dtype, shape=turned, perm=[0, 2, 3, 1, 4])
        rows = b.constant(int64(0, d.kv_heads, -1, d.head_dim), "group_rows")
        shape: list[Dim] = ["batch", d.kv_heads, "group_seq", d.head_dim]
        return b.op("Reshape", [moved, rows], name=f"{node}/rows", dtype=dtype, shape=shape)

    def _together(self, out: ir.Value, node: str) -> ir.Value:
        """(batch, kv_heads, group · seq, head_dim) -> (batch, seq, heads · head_dim)."""
        d, b, dtype = self._in.decoder, self._in.builder, self.precision.dtype
        width = d.heads * d.head_dim
        if self._group > 1:
            apart: list[Dim] = ["batch", d.kv_heads, self._group, "seq", d.head_dim]
            sizes = b.constant(int64(0, d.kv_heads, self._group, -1, d.head_dim), "apart_groups")
            out = b.op("Reshape", [out, sizes], name=f"{node}/apart", dtype=dtype, shape=apart)
        perm = [0, 3, 1, 2, 4] if self._group > 1 else [0, 2, 1, 3]
        shape = dims(out)
        by_token = b.op(
            "Transpose", [out], name=f"{node}/by_token", dtype=dtype, shape=[shape[axis] for axis in perm], perm=perm
        )
        return b.op(
            "Reshape", [by_token, b.constant(int64(0, 0, width), "join_heads")], name=f"{node}/joined", dtype=dtype,
            shape=["batch", "seq", width],
        )  # fmt: skip

    def _bias(self, window: int | None) -> ir.Value:
        """0 where a query sees a key, else very negative: float32 (batch, 1, group · seq, total)."""
        if window not in self._biases:
            b, prefix = self._in.builder, "/attention" if window is None else f"/attention/window_{window}"
            choices = [b.constant(np.array(v, np.float32), n) for v, n in ((0, "float_zero"), (_HIDDEN, "hidden"))]
            shape: list[Dim] = ["batch", 1, "seq", "total"]
            bias = b.op("Where", [self.mask_of(window), *choices], name=f"{prefix}/bias", dtype=WIDE, shape=shape)
            if self._group > 1:
                repeated: list[Dim] = ["batch", 1, "group_seq", "total"]
                copies = [bias] * self._group
                bias = b.op("Concat", copies, name=f"{prefix}/group_bias", dtype=WIDE, shape=repeated, axis=2)
            self._biases[window] = bias
        return self._biases[window]
