"""Attention per dialect: what is computed once per graph (masks, positions, rotary tables) and once per block."""

from __future__ import annotations

from collections.abc import Callable

from mixt_export.lower.attention.decomposed import DecomposedAttention
from mixt_export.lower.attention.interface import Attention, Cache, Heads, Inputs
from mixt_export.lower.attention.portable import ConcatAttention
from mixt_export.lower.attention.shared_buffer import SharedBufferAttention
from mixt_export.lower.attention.standard import StandardAttention

__all__ = ["ATTENTIONS", "Attention", "Cache", "Heads", "Inputs"]

#: Dialect -> its attention, made once per graph.
ATTENTIONS: dict[str, Callable[[Inputs], Attention]] = {
    "ort": SharedBufferAttention,
    "portable": ConcatAttention,
    "trt10": DecomposedAttention,
    "trt11": StandardAttention,
}
