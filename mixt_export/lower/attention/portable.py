"""Standard opset 23 Attention whose node itself joins past and new keys (dialect portable)."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from mixt_export.families.wiring import Block
from mixt_export.lower.attention.interface import Cache, Heads, Inputs, rotary_attributes
from mixt_export.lower.attention.interface import int64 as ints
from mixt_export.lower.builder import Dim


class ConcatAttention:
    """Standard opset 23 Attention and RotaryEmbedding: present = past ++ new, sequences left-padded."""

    packs_qkv = False

    def __init__(self, inputs: Inputs) -> None:
        self._in = inputs
        b, mask, int64, boolean = inputs.builder, inputs.attention_mask, ir.DataType.INT64, ir.DataType.BOOL
        zero, one = b.constant(ints(0), "zero"), b.constant(ints(1), "one")
        seq = b.op("Shape", [inputs.input_ids], name="/attention/seq", dtype=int64, shape=[1], start=1)
        total = b.op("Shape", [mask], name="/attention/total", dtype=int64, shape=[1], start=1)
        past = b.op("Sub", [total, seq], name="/attention/past", dtype=int64, shape=[1])

        # Positions count the valid tokens, so a left-padded sequence starts at 0 where its text does.
        counted = b.op("CumSum", [mask, one], name="/position/count", dtype=int64, shape=["batch", "total"])
        shifted = b.op("Sub", [counted, one], name="/position/shift", dtype=int64, shape=["batch", "total"])
        positive = b.op("Max", [shifted, zero], name="/position/clip", dtype=int64, shape=["batch", "total"])
        self._positions = b.op(
            "Slice", [positive, past, total, one], name="/position/ids", dtype=int64, shape=["batch", "seq"]
        )

        scalar: list[Dim] = []
        past_end, total_end = (
            b.op("Squeeze", [value], name=f"/attention/{name}", dtype=int64, shape=scalar)
            for value, name in ((past, "past_end"), (total, "total_end"))
        )
        first, step = (b.constant(np.array(v, dtype=np.int64), f"scalar_{v}") for v in (0, 1))
        keys = b.op("Range", [first, total_end, step], name="/attention/keys", dtype=int64, shape=["total"])
        new = b.op("Range", [past_end, total_end, step], name="/attention/queries", dtype=int64, shape=["seq"])
        self._keys = keys
        self._queries = b.op("Unsqueeze", [new, one], name="/attention/query_column", dtype=int64, shape=["seq", 1])
        grid: list[Dim] = ["seq", "total"]
        causal = b.op("LessOrEqual", [keys, self._queries], name="/attention/causal", dtype=boolean, shape=grid)
        # A padded query sees itself and nothing else: a row without any key would be 0/0, and its NaN would spread.
        itself = b.op("Equal", [keys, self._queries], name="/attention/itself", dtype=boolean, shape=grid)
        wide: list[Dim] = ["batch", 1, 1, "total"]
        rows = b.op("Unsqueeze", [mask, b.constant(ints(1, 2), "axes_1_2")], name="/attention/mask_rows",
                    dtype=int64, shape=wide)  # fmt: skip
        valid = b.op("Cast", [rows], name="/attention/valid", dtype=boolean, shape=wide, to=boolean)
        full: list[Dim] = ["batch", 1, "seq", "total"]
        usable = b.op("Or", [valid, itself], name="/attention/usable", dtype=boolean, shape=full)
        self._mask = b.op("And", [usable, causal], name="/attention/mask", dtype=boolean, shape=full)
        self._windowed: dict[int, ir.Value] = {}
        self._tables = {rope: inputs.rotary_tables(rope, inputs.dtype) for rope in inputs.decoder.ropes}

    def positions(self) -> ir.Value:
        """See Attention.positions."""
        return self._positions

    def attend(self, block: Block, heads: Heads, past: Cache, node: str) -> tuple[ir.Value, Cache]:
        """See Attention.attend."""
        d, b, dtype, attention = self._in.decoder, self._in.builder, self._in.dtype, block.attention
        assert heads.k is not None and heads.v is not None  # packs_qkv is False
        rotated = [
            self._rotated(value, block, count, f"{node}/{name}_rotary")
            for value, name, count in ((heads.q, "q", d.heads), (heads.k, "k", d.kv_heads))
        ]
        softcap: dict[str, Any] = {} if attention.softcap is None else {"softcap": attention.softcap}
        present: list[Dim] = ["batch", d.kv_heads, "total", d.head_dim]
        out, key, value = b.ops(
            "Attention",
            [*rotated, heads.v, self._mask_of(attention.window), past.key, past.value],
            name=f"{node}/Attention",
            outputs=[(dtype, ["batch", "seq", d.heads * d.head_dim]), (dtype, present), (dtype, present)],
            q_num_heads=d.heads,
            kv_num_heads=d.kv_heads,
            scale=attention.scale,
            is_causal=0,
            **softcap,
        )
        return out, Cache(key, value)

    def _rotated(self, x: ir.Value, block: Block, count: int, node: str) -> ir.Value:
        """X (batch, seq, count · head_dim), its heads rotated where the block's attention does."""
        d, rope = self._in.decoder, block.attention.rope
        if rope is None:
            return x
        return self._in.builder.op(
            "RotaryEmbedding", [x, *self._tables[rope], self._positions], name=node, dtype=self._in.dtype,
            shape=["batch", "seq", count * d.head_dim], num_heads=count, **rotary_attributes(rope, d.head_dim),
        )  # fmt: skip

    def last_position(self, hidden: ir.Value, node: str) -> ir.Value:
        """Left padding puts every sequence's last token at the end."""
        b = self._in.builder
        bounds = [b.constant(ints(v), n) for v, n in ((-1, "minus_one"), (np.iinfo(np.int64).max, "end"), (1, "one"))]
        shape: list[Dim] = ["batch", 1, self._in.decoder.hidden_size]
        return b.op("Slice", [hidden, *bounds], name=node, dtype=self._in.dtype, shape=shape)

    def _mask_of(self, window: int | None) -> ir.Value:
        """The causal mask, narrowed to keys with query - key < window."""
        if window is None:
            return self._mask
        if window not in self._windowed:
            b, boolean, prefix = self._in.builder, ir.DataType.BOOL, f"/attention/window_{window}"
            oldest = b.op(
                "Sub", [self._queries, b.constant(ints(window), f"window_{window}")], name=f"{prefix}/oldest",
                dtype=ir.DataType.INT64, shape=["seq", 1],
            )  # fmt: skip
            near = b.op("Less", [oldest, self._keys], name=f"{prefix}/near", dtype=boolean, shape=["seq", "total"])
            shape: list[Dim] = ["batch", 1, "seq", "total"]
            self._windowed[window] = b.op("And", [self._mask, near], name=f"{prefix}/mask", dtype=boolean, shape=shape)
        return self._windowed[window]
