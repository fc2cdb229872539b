"""The start of the residual stream: token embeddings, scaled where the family does, and learned positions."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from mixt_export.families.wiring import Decoder
from mixt_export.lower.builder import Dim
from mixt_export.lower.context import Context


def embed(context: Context, decoder: Decoder, input_ids: ir.Value, positions: Callable[[], ir.Value]) -> ir.Value:
    """(batch, seq, hidden) in the graph's dtype; ``positions()`` gives those of the new tokens, int64 (batch, seq)."""
    shape: list[Dim] = ["batch", "seq", decoder.hidden_size]
    node = "/model/embed_tokens"
    x = _rows(context, decoder.embedding, (decoder.vocab_size, decoder.hidden_size), input_ids, f"{node}/Gather", shape)
    x = context.scaled(x, decoder.embedding_scale, f"{node}/scaled")
    learned = decoder.positions
    if learned is None:
        return x
    table = (learned.rows, decoder.hidden_size)
    rows = _rows(context, learned.weight, table, positions(), "/position/Gather", shape)
    return context.binary("Add", x, rows, f"{node}/positions")


def _rows(
    context: Context, name: str, expected: tuple[int, int], index: ir.Value, node: str, shape: list[Dim]
) -> ir.Value:
    context.weights.expect(name, expected)
    table = context.builder.initializer(context.weights.tensor(name))
    return context.builder.op("Gather", [table, index], name=node, dtype=context.dtype, shape=shape)
