"""Attention per dialect: what is computed once per graph (masks, positions, rotary tables) and once per block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from mixt_export.errors import UnsupportedError
from mixt_export.families.rope import cos_sin_tables
from mixt_export.families.wiring import Block, Decoder
from mixt_export.lower.builder import MICROSOFT_DOMAIN, Dim, GraphBuilder
from mixt_export.lower.weights import DTYPES, Weights

#: ONNX Runtime's kernel refuses other head sizes when it runs (not when it loads).
_GQA_HEAD_MULTIPLE = 16


@dataclass(frozen=True)
class Heads:
    """Query, key and value of one block, (batch, seq, heads · head_dim); key and value are None when q packs all."""

    q: ir.Value
    k: ir.Value | None
    v: ir.Value | None


@dataclass(frozen=True)
class Cache:
    """Past keys and values of one block, (batch, kv_heads, past, head_dim)."""

    key: ir.Value
    value: ir.Value


class Attention(Protocol):
    """One dialect's attention."""

    packs_qkv: bool

    def attend(self, block: Block, heads: Heads, past: Cache, node: str) -> tuple[ir.Value, Cache]:
        """Attention output (batch, seq, heads · head_dim) before the output projection, and the new cache."""
        ...

    def last_position(self, hidden: ir.Value, node: str) -> ir.Value:
        """(batch, seq, hidden) -> (batch, 1, hidden) at each sequence's last valid position."""
        ...


@dataclass
class Inputs:
    """Graph inputs and settings that every dialect's attention starts from."""

    builder: GraphBuilder
    weights: Weights
    decoder: Decoder
    input_ids: ir.Value
    attention_mask: ir.Value
    max_seq_len: int

    @property
    def dtype(self) -> ir.DataType:
        """Activation dtype."""
        return DTYPES[self.weights.dtype]

    def rotary_tables(self) -> tuple[ir.Value, ir.Value]:
        """Cosines and sines (max_seq_len, head_dim / 2) in the activation dtype."""
        cos, sin = cos_sin_tables(self.decoder.rope, self.max_seq_len)
        dtype = self.dtype.numpy()
        return (
            self.builder.initializer(self.weights.computed("/rotary/cos", cos.astype(dtype))),
            self.builder.initializer(self.weights.computed("/rotary/sin", sin.astype(dtype))),
        )


def _int64(*values: int) -> np.ndarray[Any, Any]:
    return np.array(values, dtype=np.int64)


class SharedBufferAttention:
    """com.microsoft GroupQueryAttention: rotary inside, past and present in one buffer, sequences right-padded."""

    packs_qkv = True

    def __init__(self, inputs: Inputs) -> None:
        if inputs.decoder.head_dim % _GQA_HEAD_MULTIPLE:
            raise UnsupportedError(
                f"config.json: head_dim {inputs.decoder.head_dim} is not a multiple of {_GQA_HEAD_MULTIPLE}, which "
                "ONNX Runtime's GroupQueryAttention needs with rotary embeddings; export with --target onnx."
            )
        self._in = inputs
        b, mask = inputs.builder, inputs.attention_mask
        one = b.constant(_int64(1), "one")
        count = b.op(
            "ReduceSum",
            [mask, one],
            name="/attention/valid_count",
            dtype=ir.DataType.INT64,
            shape=["batch"],
            keepdims=0,
        )
        self._last = b.op("Sub", [count, one], name="/attention/last_index", dtype=ir.DataType.INT64, shape=["batch"])
        self._seqlens = b.op(
            "Cast", [self._last], name="/attention/seqlens_k", dtype=ir.DataType.INT32, shape=["batch"],
            to=ir.DataType.INT32,
        )  # fmt: skip
        length = b.op("Shape", [mask], name="/attention/mask_length", dtype=ir.DataType.INT64, shape=[1], start=1)
        scalar = b.op("Squeeze", [length], name="/attention/total", dtype=ir.DataType.INT64, shape=[])
        self._total = b.op(
            "Cast", [scalar], name="/attention/total_length", dtype=ir.DataType.INT32, shape=[], to=ir.DataType.INT32
        )
        self._cos, self._sin = inputs.rotary_tables()

    def attend(self, block: Block, heads: Heads, past: Cache, node: str) -> tuple[ir.Value, Cache]:
        """See Attention.attend."""
        d, b = self._in.decoder, self._in.builder
        present: list[Dim] = ["batch", d.kv_heads, "present", d.head_dim]
        window = {} if block.window is None else {"local_window_size": block.window}
        out, key, value = b.ops(
            "GroupQueryAttention",
            [heads.q, heads.k, heads.v, past.key, past.value, self._seqlens, self._total, self._cos, self._sin],
            name=f"{node}/GroupQueryAttention",
            domain=MICROSOFT_DOMAIN,
            outputs=[
                (self._in.dtype, ["batch", "seq", d.heads * d.head_dim]),
                (self._in.dtype, present),
                (self._in.dtype, present),
            ],
            num_heads=d.heads,
            kv_num_heads=d.kv_heads,
            do_rotary=1,
            rotary_interleaved=0,
            scale=d.head_dim**-0.5,
            **window,
        )
        return out, Cache(key, value)

    def last_position(self, hidden: ir.Value, node: str) -> ir.Value:
        """Index min(valid - 1, seq - 1): the first covers a right-padded prefill, the second decoding with a past."""
        b, d = self._in.builder, self._in.decoder
        one = b.constant(_int64(1), "one")
        seq = b.op("Shape", [self._in.input_ids], name="/lm_head/seq", dtype=ir.DataType.INT64, shape=[1], start=1)
        end = b.op("Sub", [seq, one], name="/lm_head/seq_end", dtype=ir.DataType.INT64, shape=[1])
        index = b.op("Min", [self._last, end], name="/lm_head/index", dtype=ir.DataType.INT64, shape=["batch"])
        indices = b.op(
            "Unsqueeze", [index, b.constant(_int64(1, 2), "axes_1_2")], name="/lm_head/indices",
            dtype=ir.DataType.INT64, shape=["batch", 1, 1],
        )  # fmt: skip
        return b.op(
            "GatherND", [hidden, indices], name=node, dtype=self._in.dtype, shape=["batch", 1, d.hidden_size],
            batch_dims=1,
        )  # fmt: skip


class ConcatAttention:
    """Standard opset 23 Attention and RotaryEmbedding: present = past ++ new, sequences left-padded."""

    packs_qkv = False

    def __init__(self, inputs: Inputs) -> None:
        self._in = inputs
        b, mask, int64, boolean = inputs.builder, inputs.attention_mask, ir.DataType.INT64, ir.DataType.BOOL
        zero, one = b.constant(_int64(0), "zero"), b.constant(_int64(1), "one")
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
        rows = b.op("Unsqueeze", [mask, b.constant(_int64(1, 2), "axes_1_2")], name="/attention/mask_rows",
                    dtype=int64, shape=wide)  # fmt: skip
        valid = b.op("Cast", [rows], name="/attention/valid", dtype=boolean, shape=wide, to=boolean)
        full: list[Dim] = ["batch", 1, "seq", "total"]
        usable = b.op("Or", [valid, itself], name="/attention/usable", dtype=boolean, shape=full)
        self._mask = b.op("And", [usable, causal], name="/attention/mask", dtype=boolean, shape=full)
        self._windowed: dict[int, ir.Value] = {}
        self._cos, self._sin = inputs.rotary_tables()

    def attend(self, block: Block, heads: Heads, past: Cache, node: str) -> tuple[ir.Value, Cache]:
        """See Attention.attend."""
        d, b, dtype = self._in.decoder, self._in.builder, self._in.dtype
        assert heads.k is not None and heads.v is not None  # packs_qkv is False
        rotated = [
            b.op(
                "RotaryEmbedding", [value, self._cos, self._sin, self._positions], name=f"{node}/{name}_rotary",
                dtype=dtype, shape=["batch", "seq", count * d.head_dim], num_heads=count, interleaved=0,
            )
            for value, name, count in ((heads.q, "q", d.heads), (heads.k, "k", d.kv_heads))
        ]  # fmt: skip
        present: list[Dim] = ["batch", d.kv_heads, "total", d.head_dim]
        out, key, value = b.ops(
            "Attention",
            [*rotated, heads.v, self._mask_of(block.window), past.key, past.value],
            name=f"{node}/Attention",
            outputs=[(dtype, ["batch", "seq", d.heads * d.head_dim]), (dtype, present), (dtype, present)],
            q_num_heads=d.heads,
            kv_num_heads=d.kv_heads,
            scale=d.head_dim**-0.5,
            is_causal=0,
        )
        return out, Cache(key, value)

    def last_position(self, hidden: ir.Value, node: str) -> ir.Value:
        """Left padding puts every sequence's last token at the end."""
        b = self._in.builder
        bounds = [b.constant(_int64(v), n) for v, n in ((-1, "minus_one"), (np.iinfo(np.int64).max, "end"), (1, "one"))]
        shape: list[Dim] = ["batch", 1, self._in.decoder.hidden_size]
        return b.op("Slice", [hidden, *bounds], name=node, dtype=self._in.dtype, shape=shape)

    def _mask_of(self, window: int | None) -> ir.Value:
        """The causal mask, narrowed to keys with query - key < window."""
        if window is None:
            return self._mask
        if window not in self._windowed:
            b, boolean, prefix = self._in.builder, ir.DataType.BOOL, f"/attention/window_{window}"
            oldest = b.op(
                "Sub", [self._queries, b.constant(_int64(window), f"window_{window}")], name=f"{prefix}/oldest",
                dtype=ir.DataType.INT64, shape=["seq", 1],
            )  # fmt: skip
            near = b.op("Less", [oldest, self._keys], name=f"{prefix}/near", dtype=boolean, shape=["seq", "total"])
            shape: list[Dim] = ["batch", 1, "seq", "total"]
            self._windowed[window] = b.op("And", [self._mask, near], name=f"{prefix}/mask", dtype=boolean, shape=shape)
        return self._windowed[window]


ATTENTIONS: dict[str, type[SharedBufferAttention] | type[ConcatAttention]] = {
    "ort": SharedBufferAttention,
    "portable": ConcatAttention,
}
