"""Two forms of a linear in one graph: an If on the number of tokens of the run, weights outside of its branches.

onnxruntime prepacks initializers that branches read from outside as it does others, once each, so a branch costs the
memory of what it alone reads and no time (docs/variants.md); two sessions over one weight file would both hold a packed
copy of everything that is not factorised.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from mixt_export.lower.builder import GraphBuilder
from mixt_export.lower.factors import lower_form
from mixt_export.lower.weights import DTYPES
from mixt_export.network import FactorizedLinear
from mixt_export.plan import Form

if TYPE_CHECKING:
    from mixt_export.lower.linear import LinearContext  # which calls this module

#: The value that says which branch: true below the plan's number of tokens.
FEW_TOKENS = "/variants/few_tokens"


def few_tokens(builder: GraphBuilder, input_ids: ir.Value, switch: int) -> ir.Value:
    """Whether a run has fewer than ``switch`` tokens, padding included: bool scalar of input_ids (batch, seq)."""
    int64 = ir.DataType.INT64
    shape = builder.op("Shape", [input_ids], name="/variants/shape", dtype=int64, shape=[2])
    sizes = [
        builder.op(
            "Gather",
            [shape, builder.constant(np.array(axis, np.int64), f"axis_{axis}")],
            name=f"/variants/{name}",
            dtype=int64,
            shape=[],
            axis=0,
        )
        for axis, name in enumerate(("batch", "seq"))
    ]
    tokens = builder.op("Mul", sizes, name="/variants/tokens", dtype=int64, shape=[])
    limit = builder.constant(np.array(switch, np.int64), f"variants_switch_{switch}")
    return builder.op("Less", [tokens, limit], name=FEW_TOKENS, dtype=ir.DataType.BOOL, shape=[])


def lower_variants(
    context: LinearContext, few: Form, many: Form, factors: FactorizedLinear, x: ir.Value, node: str
) -> ir.Value:
    """y (batch, seq, out) = factors(x), bias included, in the form ``few`` where context.few_tokens says so."""
    assert context.few_tokens is not None  # planned together with the forms
    branches: dict[str, Any] = {}
    names = []
    for branch, form in (("then_branch", few), ("else_branch", many)):
        inner = f"{node}/{'few' if form is few else 'many'}"
        with context.builder.body() as nodes:
            y = lower_form(context, form, factors, x, inner)
        branches[branch] = ir.Graph([], [y], nodes=nodes, name=inner)
        names.append(context.forms[factors.name])
    context.forms[factors.name] = f"{names[0]} | {names[1]}"
    return context.builder.op(
        "If",
        [context.few_tokens],
        name=node,
        dtype=DTYPES[context.weights.dtype],
        shape=["batch", "seq", factors.out_features],
        **branches,
    )
