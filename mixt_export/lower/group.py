"""Lower linears that read the same input: q, k and v; gate and up."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from mixt_export.families.wiring import Linear
from mixt_export.lower.linear import LinearContext, lower_linear


def lower_group(
    context: LinearContext, linears: Sequence[Linear], x: ir.Value, nodes: Sequence[str], *, biased: bool = True
) -> list[ir.Value]:
    """y_i (batch, seq, out_i) = linears[i](x) for each linear, in order; ``nodes[i]`` names the node of linears[i].

    First steps that the plan shares (see plan.sharing) are computed once, when the first of ``linears`` needs them: it
    is the same ``x`` that makes them common. Without ``biased`` biases are left for the caller to add.
    """
    return [lower_linear(context, linear, x, node, biased=biased) for linear, node in zip(linears, nodes, strict=True)]
