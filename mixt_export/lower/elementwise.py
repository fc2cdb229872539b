"""Elementwise steps on values that carry their dtype and shape: the result has both from the first operand."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from mixt_export.lower.builder import GraphBuilder
from mixt_export.lower.precision import dims


def type_of(x: ir.Value) -> ir.DataType:
    """Element type of ``x``."""
    assert x.dtype is not None  # the builder gives every value a dtype
    return x.dtype


def binary(builder: GraphBuilder, op_type: str, a: ir.Value, b: ir.Value, node: str) -> ir.Value:
    """``a`` op ``b``; ``b`` broadcasts to ``a``."""
    return builder.op(op_type, [a, b], name=node, dtype=type_of(a), shape=dims(a))


def scalar(builder: GraphBuilder, value: float, dtype: ir.DataType) -> ir.Value:
    """A constant of rank 0."""
    suffix = "" if dtype == ir.DataType.FLOAT else f"_{dtype.short_name()}"
    return builder.constant(np.array(value, dtype.numpy()), f"number_{value!r}{suffix}")


def scaled(builder: GraphBuilder, x: ir.Value, factor: float, node: str) -> ir.Value:
    """X · factor; no node where the factor is 1."""
    return x if factor == 1.0 else binary(builder, "Mul", x, scalar(builder, factor, type_of(x)), node)


def softcapped(builder: GraphBuilder, x: ir.Value, cap: float, node: str) -> ir.Value:
    """Cap · tanh(x / cap)."""
    small = scaled(builder, x, 1.0 / cap, f"{node}/softcap_in")
    bounded = builder.op("Tanh", [small], name=f"{node}/softcap", dtype=type_of(x), shape=dims(x))
    return scaled(builder, bounded, cap, f"{node}/softcap_out")
