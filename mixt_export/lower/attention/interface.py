"""What every dialect's attention is given and gives: heads, cache, inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from mixt_export.families.rope import cos_sin_tables
from mixt_export.families.wiring import Block, Decoder
from mixt_export.lower.builder import GraphBuilder
from mixt_export.lower.precision import Islands, Precision
from mixt_export.lower.weights import DTYPES, Weights


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
    precision: Precision
    islands: Islands

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


def int64(*values: int) -> np.ndarray[Any, Any]:
    """A vector of shapes, axes or bounds."""
    return np.array(values, dtype=np.int64)
