"""What every dialect's attention is given and gives: heads, cache, inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from mixt_export.families.rope import cos_sin_tables
from mixt_export.families.wiring import Block, Decoder, Rope
from mixt_export.lower.builder import GraphBuilder
from mixt_export.lower.precision import Islands, Precision
from mixt_export.lower.weights import DTYPES, Weights
from mixt_export.quantisation.cache import CacheScales


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

    def positions(self) -> ir.Value:
        """Position of every new token, int64 (batch, seq); that of padding is some valid position."""
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
    precision: Precision
    islands: Islands
    int8_cache: CacheScales | None = None
    """Scales of a cache of 8 bits, known when the graph is written."""

    @property
    def cache_dtype(self) -> ir.DataType:
        """Of past and present keys and values."""
        return self.dtype if self.int8_cache is None else ir.DataType.INT8

    @property
    def dtype(self) -> ir.DataType:
        """Activation dtype."""
        return DTYPES[self.weights.dtype]

    def rotary_prefix(self, rope: Rope) -> str:
        """Where the tables and angles of ``rope`` are named: ``/rotary`` for the model's first, then ``/rotary/1``."""
        index = self.decoder.ropes.index(rope)
        return f"/rotary/{index}" if index else "/rotary"

    def rotary_tables(self, rope: Rope, dtype: ir.DataType) -> tuple[ir.Value, ir.Value]:
        """Cosines and sines of every position, (max_seq_len, rotary_dim / 2) of ``dtype``."""
        cos, sin = cos_sin_tables(rope, self.max_seq_len)
        prefix, kind = self.rotary_prefix(rope), dtype.numpy()
        return (
            self.builder.initializer(self.weights.computed(f"{prefix}/cos", cos.astype(kind))),
            self.builder.initializer(self.weights.computed(f"{prefix}/sin", sin.astype(kind))),
        )


def rotary_attributes(rope: Rope, head_dim: int) -> dict[str, Any]:
    """Attributes of opset 23's RotaryEmbedding; its default is that whole heads rotate."""
    partial = {} if rope.rotary_dim == head_dim else {"rotary_embedding_dim": rope.rotary_dim}
    return {"interleaved": int(rope.interleaved), **partial}


def int64(*values: int) -> np.ndarray[Any, Any]:
    """A vector of shapes, axes or bounds."""
    return np.array(values, dtype=np.int64)
