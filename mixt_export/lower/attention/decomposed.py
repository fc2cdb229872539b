"""Attention of dialect trt10, written out for opset ≤ 20: rotation, two MatMuls and a softmax in float32."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from mixt_export.families.wiring import Attention, Block, Rope
from mixt_export.lower.attention.interface import Cache, Heads, Inputs, int64
from mixt_export.lower.attention.left_padded import LeftPadded
from mixt_export.lower.attention.rotation import rotate_halves, rotate_neighbours
from mixt_export.lower.builder import Dim
from mixt_export.lower.elementwise import binary, scaled, softcapped, type_of
from mixt_export.lower.precision import WIDE, dims

#: Added to the scores of keys that a query may not see. Half of the lowest float32: adding a score cannot overflow.
_HIDDEN = float(np.finfo(np.float32).min) / 2


class DecomposedAttention(LeftPadded):
    """MatMul, Softmax, MatMul. Queries that share a key head are its rows, so keys and values are never repeated.

    The scale is part of the queries' rotation, so scores leave the first MatMul already small.
    """

    def __init__(self, inputs: Inputs) -> None:
        super().__init__(inputs)
        self._group = inputs.decoder.heads // inputs.decoder.kv_heads
        self._biases: dict[int | None, ir.Value] = {}
        self._made: dict[tuple[Rope, float], tuple[list[ir.Value], list[ir.Value]]] = {}

    def _angles(self, rope: Rope, scale: float) -> tuple[list[ir.Value], list[ir.Value]]:
        """Cosine and sine of every new token, float32 (batch, seq, 1, rotary_dim / 2): for keys, and for queries."""
        if (rope, scale) not in self._made:
            b, half = self._in.builder, rope.rotary_dim // 2
            prefix = self._in.rotary_prefix(rope) + self._suffix(scale, "/scale_")
            shape: list[Dim] = ["batch", "seq", half]
            apart: list[Dim] = ["batch", "seq", 1, half]
            factor = None if scale == 1.0 else self._scale(scale)
            keys, queries = [], []
            for table, name in zip(self.tables(rope), ("cos", "sin"), strict=True):
                rows = b.op("Gather", [table, self._positions], name=f"{prefix}/{name}_rows", dtype=WIDE, shape=shape)
                angles = b.op(
                    "Unsqueeze", [rows, b.constant(int64(2), "axis_2")], name=f"{prefix}/{name}_of_keys", dtype=WIDE,
                    shape=apart,
                )  # fmt: skip
                keys.append(angles)
                if factor is not None:
                    angles = binary(b, "Mul", angles, factor, f"{prefix}/{name}_of_queries")
                queries.append(angles)
            self._made[rope, scale] = keys, queries
        return self._made[rope, scale]

    def _scale(self, scale: float) -> ir.Value:
        """The factor on the scores, float32."""
        name = f"attention_scale{self._suffix(scale, '_')}"
        return self._in.builder.constant(np.array(scale, np.float32), name)

    def _suffix(self, scale: float, separator: str) -> str:
        """What tells names that depend on ``scale`` apart; nothing for the model's first."""
        return "" if scale == self._in.decoder.blocks[0].attention.scale else f"{separator}{scale!r}"

    def attend(self, block: Block, heads: Heads, past: Cache, node: str) -> tuple[ir.Value, Cache]:
        """See Attention.attend."""
        d, b, cast, attention = self._in.decoder, self._in.builder, self.precision, block.attention
        assert heads.k is not None and heads.v is not None  # packs_qkv is False
        query, key = self._turned(heads.q, heads.k, attention, node)
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
        if attention.softcap is not None:
            scores = softcapped(b, scores, attention.softcap, node)
        masked = b.op("Add", [scores, self._bias(attention.window)], name=f"{node}/masked", dtype=WIDE, shape=grid)
        soft = cast.narrow(b.op("Softmax", [masked], name=f"{node}/Softmax", dtype=WIDE, shape=grid, axis=-1))
        mixed: list[Dim] = ["batch", d.kv_heads, "group_seq", d.head_dim]
        out = b.op("MatMul", [soft, cache.value], name=f"{node}/mixed", dtype=cast.dtype, shape=mixed)
        return self._together(out, node), cache

    def _turned(self, q: ir.Value, k: ir.Value, attention: Attention, node: str) -> tuple[ir.Value, ir.Value]:
        """Queries, scaled, and keys as (batch, seq, count, head_dim), rotated, in the dtypes they have."""
        d, rope = self._in.decoder, attention.rope
        if rope is None:
            query = self.heads_apart(q, d.heads, f"{node}/q", transpose=False)
            key = self.heads_apart(k, d.kv_heads, f"{node}/k", transpose=False)
            return scaled(self._in.builder, query, attention.scale, f"{node}/q_scaled"), key
        keys, queries = self._angles(rope, attention.scale)
        query = self._rotated_part(q, d.heads, rope, queries, attention.scale, f"{node}/q_rotary")
        return query, self._rotated_part(k, d.kv_heads, rope, keys, 1.0, f"{node}/k_rotary")

    def _rotated_part(
        self, x: ir.Value, count: int, rope: Rope, angles: list[ir.Value], scale: float, node: str
    ) -> ir.Value:
        """(batch, seq, count · head_dim) -> (batch, seq, count, head_dim); what does not rotate is scaled."""
        b, rest = self._in.builder, self._in.decoder.head_dim - rope.rotary_dim
        dtype = type_of(x)
        convert = self.precision.wide if dtype == WIDE else self.precision.narrow
        cos, sin = (convert(table) for table in angles)
        apart = self.heads_apart(x, count, node, transpose=False)
        rotate = rotate_neighbours if rope.interleaved else rotate_halves
        if not rest:
            return rotate(b, apart, cos, sin, node)
        sizes = b.constant(int64(rope.rotary_dim, rest), f"rotary_{rope.rotary_dim}_of_{rope.rotary_dim + rest}")
        shapes: list[list[Dim]] = [["batch", "seq", count, rope.rotary_dim], ["batch", "seq", count, rest]]
        turning, still = b.ops(
            "Split", [apart, sizes], name=f"{node}/parts", outputs=[(dtype, shape) for shape in shapes], axis=-1
        )
        turned = rotate(b, turning, cos, sin, f"{node}/turned")
        still = scaled(b, still, scale, f"{node}/still")
        return b.op("Concat", [turned, still], name=f"{node}/all", dtype=dtype, shape=dims(apart), axis=-1)

    def _rows(self, query: ir.Value, node: str) -> ir.Value:
        """(batch, seq, heads, head_dim) -> (batch, kv_heads, group · seq, head_dim), the head of a group first."""
        d, b, dtype = self._in.decoder, self._in.builder, query.dtype
        assert dtype is not None  # the builder gives every value a dtype
        by_head = self.swapped(query, node)
        if self._group == 1:
            return by_head
        rows = b.constant(int64(0, d.kv_heads, -1, d.head_dim), "group_rows")
        shape: list[Dim] = ["batch", d.kv_heads, "group_seq", d.head_dim]
        return b.op("Reshape", [by_head, rows], name=f"{node}/rows", dtype=dtype, shape=shape)

    def _together(self, out: ir.Value, node: str) -> ir.Value:
        """(batch, kv_heads, group · seq, head_dim) -> (batch, seq, heads · head_dim).

        No axis for the group: Myelin (TensorRT-RTX 1.7.1) fails on a product whose result is permuted in five axes
        and multiplied again head by head (CHECK(new_stride_order[i1] != new_stride_order[i2])).
        """
        d, b, dtype = self._in.decoder, self._in.builder, self.precision.dtype
        width = d.heads * d.head_dim
        if self._group > 1:
            apart: list[Dim] = ["batch", d.heads, "seq", d.head_dim]
            sizes = b.constant(int64(0, d.heads, -1, d.head_dim), "apart_heads")
            out = b.op("Reshape", [out, sizes], name=f"{node}/apart", dtype=dtype, shape=apart)
        shape: list[Dim] = ["batch", "seq", d.heads, d.head_dim]
        by_token = b.op("Transpose", [out], name=f"{node}/by_token", dtype=dtype, shape=shape, perm=[0, 2, 1, 3])
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
