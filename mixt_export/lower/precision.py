"""Where a graph leaves its dtype: explicit casts, and the float32 islands that keep a 16-bit graph finite.

TensorRT 10 and later take every type from the graph (strong typing) and refuse an operator whose operands differ, so
each change of dtype is a Cast node of its own, made once per value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from mixt_export.lower.builder import Dim, GraphBuilder

WIDE = ir.DataType.FLOAT

#: How islands name the output projection, tied or not.
HEAD = "lm_head"


@dataclass(frozen=True)
class Islands:
    """What a 16-bit graph computes in float32 beyond norms and softmax.

    ``residual``: the residual stream. ``attention``: blocks (by index) whose attention scores are computed from float32
    queries and keys. ``shifts``: linear -> k; its input is multiplied by 2^-k before it is rounded to 16 bits and its
    float32 output by 2^k, both exact, so that neither its output nor what flows between its factors overflows.
    """

    residual: bool = False
    attention: frozenset[int] = frozenset()
    shifts: Mapping[str, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return self.residual or bool(self.attention) or bool(self.shifts)


class Precision:
    """Casts between the graph's dtype and float32, one node per value and direction."""

    def __init__(self, builder: GraphBuilder, dtype: ir.DataType) -> None:
        self._builder, self.dtype = builder, dtype
        self._made: dict[tuple[int, ir.DataType, int], ir.Value] = {}

    def wide(self, x: ir.Value) -> ir.Value:
        """``x`` in float32."""
        return self._cast(x, WIDE)

    def narrow(self, x: ir.Value, shift: int = 0) -> ir.Value:
        """``x`` · 2^-``shift`` in the graph's dtype; the product is formed in float32."""
        if shift:
            x = self.scaled(self.wide(x), -shift)
        return self._cast(x, self.dtype)

    def scaled(self, x: ir.Value, power: int) -> ir.Value:
        """Float32 ``x`` · 2^``power``."""
        key = (id(x), WIDE, power)
        if key not in self._made:
            sign = "m" if power < 0 else ""
            factor = self._builder.constant(np.array(2.0**power, np.float32), f"two_to_{sign}{abs(power)}")
            name = f"{_stem(x)}/times_two_to_{sign}{abs(power)}"
            self._made[key] = self._builder.op("Mul", [x, factor], name=name, dtype=WIDE, shape=dims(x))
        return self._made[key]

    def _cast(self, x: ir.Value, dtype: ir.DataType) -> ir.Value:
        if x.dtype == dtype:
            return x
        key = (id(x), dtype, 0)
        if key not in self._made:
            name = f"{_stem(x)}/to_{dtype.short_name()}"
            self._made[key] = self._builder.op("Cast", [x], name=name, dtype=dtype, shape=dims(x), to=dtype)
        return self._made[key]


def dims(x: ir.Value) -> list[Dim]:
    """Shape of ``x`` as the builder takes it."""
    assert x.shape is not None  # the builder gives every value a shape
    return [dim if isinstance(dim, int) else str(dim.value) for dim in x.shape]


def _stem(x: ir.Value) -> str:
    return str(x.name).removesuffix("/output_0")
