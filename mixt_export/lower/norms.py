"""Norms per dialect.

RMS norm is one operator, one operator on float32, or written out: y = x / sqrt(mean(x²) + eps) · scale.
Layer norm is an operator of opset 17 and so never written out: y = (x - mean(x)) / sqrt(var(x) + eps) · scale + shift.
Sources: Zhang and Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467, equation 4; Ba, Kiros and Hinton,
"Layer Normalization", arXiv:1607.06450.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from mixt_export.lower.builder import Dim, GraphBuilder
from mixt_export.lower.precision import WIDE, Precision, dims

Norm = Callable[[GraphBuilder, Precision, ir.Value, ir.Value, float, str], ir.Value]
"""(builder, precision, x (…, n), scale (n,), eps, node) -> y (…, n): in the graph's dtype or in float32, see NORMS."""

LayerNorm = Callable[[GraphBuilder, Precision, ir.Value, ir.Value, ir.Value | None, float, str], ir.Value]
"""The same with a shift (n,), or None, after the scale."""


def _operator(builder: GraphBuilder, x: ir.Value, scale: ir.Value, eps: float, node: str) -> ir.Value:
    return builder.op(
        "RMSNormalization", [x, scale], name=f"{node}/RMSNormalization", dtype=_dtype(x), shape=dims(x), axis=-1,
        epsilon=eps, stash_type=1,
    )  # fmt: skip


def _fused(
    builder: GraphBuilder, _precision: Precision, x: ir.Value, scale: ir.Value, eps: float, node: str
) -> ir.Value:
    """Opset 23; the runtime keeps the statistics in float32 (stash_type 1)."""
    return _operator(builder, x, scale, eps, node)


def _typed(
    builder: GraphBuilder, precision: Precision, x: ir.Value, scale: ir.Value, eps: float, node: str
) -> ir.Value:
    """Opset 23 on float32 operands: in a strongly typed network nothing else makes the statistics float32."""
    return _operator(builder, precision.wide(x), precision.wide(scale), eps, node)


def _decomposed(
    builder: GraphBuilder, precision: Precision, x: ir.Value, scale: ir.Value, eps: float, node: str
) -> ir.Value:
    """Opset 18 to 20, on float32: the chain that TensorRT's own pattern matching knows as an RMS norm."""
    x = precision.wide(x)
    full: list[Dim] = dims(x)
    one: list[Dim] = [*full[:-1], 1]

    def op(op_type: str, inputs: list[ir.Value], name: str, shape: list[Dim], **attributes: Any) -> ir.Value:
        return builder.op(op_type, inputs, name=f"{node}/{name}", dtype=WIDE, shape=shape, **attributes)

    last = builder.constant(np.array([-1], np.int64), "last_axis")
    square = op("Mul", [x, x], "square", full)
    mean = op("ReduceMean", [square, last], "mean", one, keepdims=1)
    shifted = op("Add", [mean, builder.constant(np.array(eps, np.float32), f"eps_{eps:g}")], "add_eps", one)
    root = op("Sqrt", [shifted], "root", one)
    return op("Mul", [op("Div", [x, root], "normalised", full), precision.wide(scale)], "scaled", full)


def _layer(
    builder: GraphBuilder,
    _precision: Precision,
    x: ir.Value,
    scale: ir.Value,
    shift: ir.Value | None,
    eps: float,
    node: str,
) -> ir.Value:
    """Opset 17; the runtime keeps the statistics in float32 (stash_type 1)."""
    operands = [x, scale] if shift is None else [x, scale, shift]
    return builder.op(
        "LayerNormalization", operands, name=f"{node}/LayerNormalization", dtype=_dtype(x), shape=dims(x), axis=-1,
        epsilon=eps, stash_type=1,
    )  # fmt: skip


def _layer_typed(
    builder: GraphBuilder,
    precision: Precision,
    x: ir.Value,
    scale: ir.Value,
    shift: ir.Value | None,
    eps: float,
    node: str,
) -> ir.Value:
    """The same on float32 operands."""
    wide = None if shift is None else precision.wide(shift)
    return _layer(builder, precision, precision.wide(x), precision.wide(scale), wide, eps, node)


def _dtype(x: ir.Value) -> ir.DataType:
    assert x.dtype is not None  # the builder gives every value a dtype
    return x.dtype


#: "fused" stays in the dtype of x; the others return float32, which the reader narrows where it needs to.
NORMS: dict[str, Norm] = {"fused": _fused, "typed": _typed, "decomposed": _decomposed}

#: The layer norm of each of these forms.
LAYER_NORM: dict[str, LayerNorm] = {"fused": _layer, "typed": _layer_typed, "decomposed": _layer_typed}
