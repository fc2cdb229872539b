"""Gated MLP: down(activation(gate(x)) · up(x)) (GLU variants, arXiv:2002.05202)."""

from __future__ import annotations

import onnx_ir as ir

from mixt_export.families.wiring import GatedMlp, Linear, Mlp, PackedGatedMlp
from mixt_export.lower.context import Context, stem
from mixt_export.lower.mlp.activations import ACTIVATIONS


def lower_gated(context: Context, mlp: GatedMlp, x: ir.Value, node: str) -> ir.Value:
    """Gate and up as two linears of the same input."""
    gate, up = context.group((mlp.gate, mlp.up), x, node)
    return _product(context, mlp, (gate, up), mlp.activation, mlp.down, node)


def lower_packed(context: Context, mlp: PackedGatedMlp, x: ir.Value, node: str) -> ir.Value:
    """Gate and up as one linear, gate first."""
    both = context.linear(mlp.gate_up, x, f"{node}/{stem(mlp.gate_up.name)}")
    half = mlp.gate_up.out_features // 2
    gate, up = context.parts(both, (half, half), f"{node}/halves")
    return _product(context, mlp, (gate, up), mlp.activation, mlp.down, node)


def _product(
    context: Context, mlp: Mlp, halves: tuple[ir.Value, ir.Value], activation: str, down: Linear, node: str
) -> ir.Value:
    gate, up = halves
    if any(linear.name in context.islands.shifts for linear in mlp.linears):
        gate, up = context.precision.wide(gate), context.precision.wide(up)
    gated = context.binary("Mul", ACTIVATIONS[activation](context, gate, node), up, f"{node}/Mul")
    return context.linear(down, gated, f"{node}/{stem(down.name)}")
