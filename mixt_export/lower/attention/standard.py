"""Attention of dialect trt11: the opset 23 operators, with one output, over keys and values joined before."""

from __future__ import annotations

import onnx_ir as ir

from mixt_export.families.wiring import Block
from mixt_export.lower.attention.decomposed import DecomposedAttention
from mixt_export.lower.attention.interface import Cache, Heads, int64, rotary_attributes
from mixt_export.lower.builder import Dim
from mixt_export.lower.precision import WIDE, dims


class StandardAttention(DecomposedAttention):
    """RotaryEmbedding and Attention on (batch, heads, seq, head_dim). The past is joined by Concat.

    TensorRT refuses Attention with past and present of its own ("only supports Attention nodes with one output") and
    with a softmax_precision ("is not supported in TensorRT Attention"): the softmax is its kernel's own affair. The
    kernels are for 16 bits; what must be float32 is written out as in trt10 ("not supported by a dedicated kernel").
    So are softcapped scores, since TensorRT refuses the attribute softcap, and rotations of neighbours: RotaryEmbedding
    with interleaved = 1 is parsed by TensorRT-RTX 1.7.1 and fails to compile (Myelin, CHECK(false) in ssa.cpp).
    """

    def attend(self, block: Block, heads: Heads, past: Cache, node: str) -> tuple[ir.Value, Cache]:
        """See Attention.attend."""
        attention = block.attention
        wide = block.index in self._in.islands.attention or self._in.dtype == WIDE
        if wide or attention.softcap is not None:
            return super().attend(block, heads, past, node)
        d, b, cast = self._in.decoder, self._in.builder, self.precision
        assert heads.k is not None and heads.v is not None  # packs_qkv is False
        query = self._rotated(heads.q, block, d.heads, f"{node}/q_rotary")
        key = self._rotated(heads.k, block, d.kv_heads, f"{node}/k_rotary")
        cache = self.joined(past, key, self.heads_apart(heads.v, d.kv_heads, f"{node}/v"), node)
        dtype = cast.dtype
        operands = [cast.narrow(query), cache.key, cache.value, self.mask_of(attention.window)]
        out = b.op(
            "Attention", operands, name=f"{node}/Attention", dtype=dtype, shape=["batch", d.heads, "seq", d.head_dim],
            scale=attention.scale, is_causal=0,
        )  # fmt: skip
        shape: list[Dim] = ["batch", "seq", d.heads, d.head_dim]
        by_token = b.op("Transpose", [out], name=f"{node}/by_token", dtype=dtype, shape=shape, perm=[0, 2, 1, 3])
        width = d.heads * d.head_dim
        together = b.op(
            "Reshape", [by_token, b.constant(int64(0, 0, width), "join_heads")], name=f"{node}/joined", dtype=dtype,
            shape=["batch", "seq", width],
        )  # fmt: skip
        return together, cache

    def _rotated(self, x: ir.Value, block: Block, count: int, node: str) -> ir.Value:
        """RotaryEmbedding of (batch, seq, count · head_dim) -> (batch, count, seq, head_dim), in the dtype of x."""
        cast, rope = self.precision, block.attention.rope
        convert = cast.wide if x.dtype == WIDE else cast.narrow
        if rope is not None and rope.interleaved:
            angles, _ = self._angles(rope, 1.0)
            return self.swapped(self._rotated_part(x, count, rope, angles, 1.0, node), node)
        apart = self.heads_apart(x, count, node)
        if rope is None:
            return apart
        assert x.dtype is not None  # the builder gives every value a dtype
        return self._in.builder.op(
            "RotaryEmbedding", [apart, *(convert(table) for table in self.tables(rope)), self._positions],
            name=f"{node}/RotaryEmbedding", dtype=x.dtype, shape=dims(apart),
            **rotary_attributes(rope, self._in.decoder.head_dim),
        )  # fmt: skip
