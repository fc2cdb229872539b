"""The end of the graph: logits of the last position, from the head or the tied embedding, in float32."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from mixt_export.families.wiring import Decoder
from mixt_export.lower.builder import MICROSOFT_DOMAIN, Dim
from mixt_export.lower.context import Context
from mixt_export.lower.elementwise import softcapped
from mixt_export.lower.linear import is_dense, lower_linear
from mixt_export.lower.precision import HEAD


def head(context: Context, decoder: Decoder, x: ir.Value) -> ir.Value:
    """(batch, 1, hidden) -> logits (batch, 1, vocab) float32; bias, scale and softcap are applied in float32."""
    linears, precision = context.linears, context.precision
    shape: list[Dim] = ["batch", 1, decoder.vocab_size]
    shift = context.islands.shifts.get(HEAD, 0)
    x = precision.narrow(x, shift)
    if decoder.head is not None and not is_dense(linears, [decoder.head]):
        logits = lower_linear(linears, decoder.head, x, "/lm_head", biased=False)
    else:
        weight = decoder.embedding if decoder.head is None else f"{decoder.head.name}.weight"
        context.weights.expect(weight, (decoder.vocab_size, decoder.hidden_size))
        table = context.builder.initializer(context.weights.tensor(weight))
        logits = _product_with_rows(context, decoder, x, table, shape)
        if decoder.head is not None:
            linears.forms[decoder.head.name] = "dense"
    if context.dtype != ir.DataType.FLOAT:
        float32 = ir.DataType.FLOAT
        logits = context.builder.op("Cast", [logits], name="/lm_head/Cast", dtype=float32, shape=shape, to=float32)
    if shift:
        logits = precision.scaled(logits, shift)
    if decoder.head is not None and decoder.head.bias:
        logits = context.binary("Add", logits, precision.wide(context.bias(decoder.head)), "/lm_head/Add")
    logits = context.scaled(logits, decoder.logit_scale, "/lm_head/scaled")
    if decoder.logit_softcap is None:
        return logits
    return softcapped(context.builder, logits, decoder.logit_softcap, "/lm_head")


def _product_with_rows(context: Context, decoder: Decoder, x: ir.Value, table: ir.Value, shape: list[Dim]) -> ir.Value:
    """X (batch, 1, hidden) times the rows of ``table`` (vocab, hidden), which stays in its stored layout."""
    b, dtype, hidden, vocab_size = context.builder, context.dtype, decoder.hidden_size, decoder.vocab_size
    if context.linears.fused_transpose:
        return b.op(
            "FusedMatMul", [x, table], name="/lm_head/MatMul", dtype=dtype, shape=shape, domain=MICROSOFT_DOMAIN,
            transB=1,
        )  # fmt: skip
    rows = b.op(
        "Reshape", [x, b.constant(np.array([-1, hidden]), "rows_of_hidden")], name="/lm_head/rows", dtype=dtype,
        shape=["rows", hidden],
    )  # fmt: skip
    flat = b.op("Gemm", [rows, table], name="/lm_head/Gemm", dtype=dtype, shape=["rows", vocab_size], transB=1)
    lead = _leading(context, x)
    vocab = b.constant(np.array([vocab_size]), "vocab_size")
    full = b.op("Concat", [lead, vocab], name="/lm_head/shape", dtype=ir.DataType.INT64, shape=[3], axis=0)
    return b.op("Reshape", [flat, full], name="/lm_head/Reshape", dtype=dtype, shape=shape)


def _leading(context: Context, x: ir.Value) -> ir.Value:
    """The first two sizes of ``x``; TensorRT's older parsers do not read a range from Shape itself."""
    b, int64, name = context.builder, ir.DataType.INT64, "/lm_head/leading"
    if not context.dialect.typed:
        return b.op("Shape", [x], name=name, dtype=int64, shape=[2], start=0, end=2)
    sizes = b.op("Shape", [x], name=f"{name}_shape", dtype=int64, shape=[3])
    return b.op("Gather", [sizes, b.constant(np.array([0, 1]), "first_two")], name=name, dtype=int64, shape=[2])
