"""Which experts a token goes to, and where its row goes when rows are laid out expert by expert.

A token chooses an expert at most once, so the place of a (token, expert) pair among those of its expert is the number
of earlier tokens that chose the expert: a running count over (tokens, experts), exact in float32 up to 2^24 tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from mixt_export.families.wiring import MoeMlp
from mixt_export.lower.builder import Dim
from mixt_export.lower.context import Context
from mixt_export.lower.linear import lower_dense
from mixt_export.lower.precision import WIDE

INT64 = ir.DataType.INT64

#: Symbolic sizes: batch · seq, and (token, chosen expert) pairs.
TOKENS, PAIRS = "tokens", "pairs"


@dataclass(frozen=True)
class Route:
    """``index``: chosen experts (tokens, k) int64, best first; ``weight``: their weights (tokens, k), graph's dtype.

    ``counts``: tokens of each expert (experts,) float32; ``before``: (tokens, experts) float32, how many earlier tokens
    chose the expert.
    """

    index: ir.Value
    weight: ir.Value
    counts: ir.Value
    before: ir.Value


class Nodes:
    """Appends nodes below one name."""

    def __init__(self, context: Context, node: str) -> None:
        self.context, self.node = context, node

    def op(
        self, op_type: str, inputs: Sequence[ir.Value], name: str, dtype: ir.DataType, shape: Sequence[Dim], **more: Any
    ) -> ir.Value:
        """One node with one output."""
        return self.context.builder.op(
            op_type, list(inputs), name=f"{self.node}/{name}", dtype=dtype, shape=list(shape), **more
        )

    def vector(self, values: Sequence[int]) -> ir.Value:
        """A constant int64 vector."""
        label = "_".join(str(value).replace("-", "m") for value in values)
        return self.context.builder.constant(np.array(values, np.int64), f"ints_{label}")

    def whole(self, value: int) -> ir.Value:
        """A constant int64 number."""
        return self.context.builder.constant(np.array(value, np.int64), f"int_{value}")

    def number(self, value: float) -> ir.Value:
        """A constant float32 number."""
        return self.context.builder.constant(np.array(value, np.float32), f"float_{value:g}")

    def size(self, x: ir.Value, axis: int, name: str) -> ir.Value:
        """The size of an axis of ``x`` as an int64 number."""
        assert x.shape is not None  # the builder gives every value a shape
        shape = self.op("Shape", [x], f"{name}_shape", INT64, [len(x.shape)])
        return self.op("Gather", [shape, self.whole(axis)], name, INT64, [])


def route(context: Context, moe: MoeMlp, rows: ir.Value, node: str) -> Route:
    """Score the experts for ``rows`` (1, tokens, hidden) and choose.

    Scores, softmax and choice as in transformers' Qwen3MoeTopKRouter: logits in the graph's dtype, the rest in float32.
    Where two scores are equal the lower index wins; torch promises no order there.
    """
    n, count, k = Nodes(context, node), len(moe.experts), moe.top_k
    logits = lower_dense(context.linears, [moe.router], context.precision.narrow(rows), f"{node}/gate")
    logits.shape = ir.Shape([1, TOKENS, count])
    wide = context.precision.wide(logits)
    flat = n.op("Reshape", [wide, n.vector([-1, count])], "router/logits", WIDE, [TOKENS, count])
    scores = n.op("Softmax", [flat], "router/Softmax", WIDE, [TOKENS, count], axis=-1)
    best, index = context.builder.ops(
        "TopK", [scores, n.vector([k])], name=f"{node}/router/TopK",
        outputs=[(WIDE, [TOKENS, k]), (INT64, [TOKENS, k])], axis=-1, largest=1, sorted=1,
    )  # fmt: skip
    if moe.normalised:
        total = n.op("ReduceSum", [best, n.vector([-1])], "router/sum", WIDE, [TOKENS, 1], keepdims=1)
        best = n.op("Div", [best, total], "router/normalised", WIDE, [TOKENS, k])
    apart = n.op("Unsqueeze", [index, n.vector([2])], "router/index_column", INT64, [TOKENS, k, 1])
    numbers = context.builder.constant(np.arange(count), f"numbers_to_{count}")
    equal = n.op("Equal", [apart, numbers], "router/is_chosen", ir.DataType.BOOL, [TOKENS, k, count])
    ones = n.op("Cast", [equal], "router/ones", WIDE, [TOKENS, k, count], to=WIDE)
    chosen = n.op("ReduceSum", [ones, n.vector([1])], "router/chosen", WIDE, [TOKENS, count], keepdims=0)
    counts = n.op("ReduceSum", [chosen, n.vector([0])], "router/counts", WIDE, [count], keepdims=0)
    return Route(index, context.precision.narrow(best), counts, _running_count(n, chosen, count))


def first_rows(n: Nodes, lengths: ir.Value, count: int) -> ir.Value:
    """Where each of ``count`` pieces of ``lengths`` (count,) float32 begins when they lie one after the other."""
    if "CumSum" in n.context.dialect.operators[""]:
        return n.op("CumSum", [lengths, n.whole(0)], "placing/first", WIDE, [count], exclusive=1)
    triangle = n.context.builder.constant(np.triu(np.ones((count, count), np.float32), 1), f"triangle_{count}")
    return n.op("MatMul", [lengths, triangle], "placing/first", WIDE, [count])


def place(n: Nodes, routed: Route, first: ir.Value, top_k: int, count: int) -> ir.Value:
    """Row of each pair, (tokens, k) int64, when the rows of expert e begin at ``first`` (experts,)[e]."""
    rows = n.op("Add", [routed.before, first], "placing/rows", WIDE, [TOKENS, count])
    own = n.op("GatherElements", [rows, routed.index], "placing/own_row", WIDE, [TOKENS, top_k], axis=1)
    return n.op("Cast", [own], "placing/row", INT64, [TOKENS, top_k], to=INT64)


def sources(n: Nodes, row: ir.Value, total: ir.Value, size: str, top_k: int) -> ir.Value:
    """Token whose row lies at each of ``total`` places, (``size``,) int64; token 0 at places that stay empty."""
    flat = n.op("Reshape", [row, n.vector([-1])], "placing/row_of_pair", INT64, [PAIRS])
    pairs = n.size(flat, 0, "placing/pairs")
    numbers = n.op("Range", [n.whole(0), pairs, n.whole(1)], "placing/pair_numbers", INT64, [PAIRS])
    tokens = n.op("Div", [numbers, n.whole(top_k)], "placing/token_of_pair", INT64, [PAIRS])
    length = n.op("Unsqueeze", [total, n.vector([0])], "placing/length", INT64, [1])
    empty = n.op("Expand", [n.whole(0), length], "placing/empty", INT64, [size])
    return n.op("ScatterElements", [empty, flat, tokens], "placing/source", INT64, [size], axis=0)


def _running_count(n: Nodes, chosen: ir.Value, count: int) -> ir.Value:
    """Sums of ``chosen`` (tokens, experts) over earlier tokens."""
    shape: list[Dim] = [TOKENS, count]
    if "CumSum" in n.context.dialect.operators[""]:
        return n.op("CumSum", [chosen, n.whole(0)], "router/before", WIDE, shape, exclusive=1)
    # TensorRT 10.3 has no running sum of its own: a product with a strict lower triangle.
    tokens = n.size(chosen, 0, "router/tokens")
    numbers = n.op("Range", [n.whole(0), tokens, n.whole(1)], "router/token_numbers", INT64, [TOKENS])
    column = n.op("Unsqueeze", [numbers, n.vector([1])], "router/token_column", INT64, [TOKENS, 1])
    earlier = n.op("Less", [numbers, column], "router/is_earlier", ir.DataType.BOOL, [TOKENS, "tokens_before"])
    triangle = n.op("Cast", [earlier], "router/earlier", WIDE, [TOKENS, "tokens_before"], to=WIDE)
    return n.op("MatMul", [triangle, chosen], "router/before", WIDE, shape)
