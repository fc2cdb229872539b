"""Two linears with an activation between them (Vaswani et al., arXiv:1706.03762, section 3.3)."""

from __future__ import annotations

import onnx_ir as ir

from mixt_export.families.wiring import PlainMlp
from mixt_export.lower.context import Context, stem
from mixt_export.lower.mlp.activations import ACTIVATIONS


def lower_plain(context: Context, mlp: PlainMlp, x: ir.Value, node: str) -> ir.Value:
    """down(activation(up(x)))."""
    hidden = context.linear(mlp.up, x, f"{node}/{stem(mlp.up.name)}")
    if any(linear.name in context.islands.shifts for linear in mlp.linears):
        hidden = context.precision.wide(hidden)
    return context.linear(mlp.down, ACTIVATIONS[mlp.activation](context, hidden, node), f"{node}/{stem(mlp.down.name)}")
