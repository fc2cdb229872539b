"""Activation functions, each in the dtype it is given.

Gelu is one operator where the dialect has it (opset 20); written out it is computed in float32, because its cube leaves
float16 at |x| = 40. Sources: SiLU arXiv:1702.03118; GELU arXiv:1606.08415, exact and with tanh (its section 2).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import onnx_ir as ir

from mixt_export.lower.context import Context
from mixt_export.lower.elementwise import scalar, type_of
from mixt_export.lower.precision import WIDE, dims

Activation = Callable[[Context, ir.Value, str], ir.Value]

_CUBIC = 0.044715


def _unary(context: Context, op_type: str, x: ir.Value, node: str, **attributes: str) -> ir.Value:
    return context.builder.op(op_type, [x], name=node, dtype=type_of(x), shape=dims(x), **attributes)


def _silu(context: Context, x: ir.Value, node: str) -> ir.Value:
    return context.binary("Mul", x, _unary(context, "Sigmoid", x, f"{node}/Sigmoid"), f"{node}/SiLU")


def _relu(context: Context, x: ir.Value, node: str) -> ir.Value:
    return _unary(context, "Relu", x, f"{node}/Relu")


def _gelu(context: Context, x: ir.Value, node: str) -> ir.Value:
    """x/2 · (1 + erf(x / √2))."""
    if "Gelu" in context.dialect.operators[""]:
        return _unary(context, "Gelu", x, f"{node}/Gelu", approximate="none")
    wide = context.precision.wide(x)
    inner = context.scaled(wide, math.sqrt(0.5), f"{node}/gelu_in")
    return _halved(context, x, wide, _unary(context, "Erf", inner, f"{node}/gelu_erf"), node)


def _gelu_tanh(context: Context, x: ir.Value, node: str) -> ir.Value:
    """x/2 · (1 + tanh(√(2/π) (x + 0.044715 x³)))."""
    if "Gelu" in context.dialect.operators[""]:
        return _unary(context, "Gelu", x, f"{node}/Gelu", approximate="tanh")
    wide = context.precision.wide(x)
    square = context.binary("Mul", wide, wide, f"{node}/gelu_square")
    small = context.scaled(square, _CUBIC, f"{node}/gelu_cubic")
    factor = context.binary("Add", small, scalar(context.builder, 1.0, WIDE), f"{node}/gelu_factor")
    sum_ = context.binary("Mul", wide, factor, f"{node}/gelu_sum")
    inner = context.scaled(sum_, math.sqrt(2.0 / math.pi), f"{node}/gelu_in")
    return _halved(context, x, wide, _unary(context, "Tanh", inner, f"{node}/gelu_tanh"), node)


def _halved(context: Context, x: ir.Value, wide: ir.Value, bent: ir.Value, node: str) -> ir.Value:
    """x/2 · (1 + bent) in the dtype of x; ``wide`` is x in float32."""
    shifted = context.binary("Add", bent, scalar(context.builder, 1.0, WIDE), f"{node}/gelu_shifted")
    product = context.binary("Mul", wide, shifted, f"{node}/gelu_product")
    y = context.scaled(product, 0.5, f"{node}/Gelu")
    return y if type_of(x) == WIDE else context.precision.narrow(y)


#: Name of an activation in the wiring -> (context, x, node) -> y.
ACTIVATIONS: dict[str, Activation] = {
    "silu": _silu,
    "relu": _relu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
}
