"""What lowering a part of a block works with: builder, weights, precision, and the parts every block is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from mixt_export.families.wiring import Linear, Norm
from mixt_export.lower import elementwise
from mixt_export.lower.builder import Dim, GraphBuilder
from mixt_export.lower.dialects import Dialect
from mixt_export.lower.elementwise import type_of
from mixt_export.lower.group import lower_group
from mixt_export.lower.linear import LinearContext, lower_linear
from mixt_export.lower.norms import LAYER_NORM, NORMS
from mixt_export.lower.precision import Islands, Precision, dims
from mixt_export.lower.weights import DTYPES, Weights


@dataclass(frozen=True)
class Context:
    """One graph being lowered. Values are (batch, seq, features) unless said otherwise."""

    builder: GraphBuilder
    weights: Weights
    dialect: Dialect
    precision: Precision
    islands: Islands
    linears: LinearContext

    @property
    def dtype(self) -> ir.DataType:
        """Activation dtype."""
        return DTYPES[self.weights.dtype]

    def linear(self, linear: Linear, x: ir.Value, node: str) -> ir.Value:
        """linear(x) in the graph's dtype, or in float32 where the linear is an island."""
        shift = self.islands.shifts.get(linear.name)
        if shift is None:
            return lower_linear(self.linears, linear, self.precision.narrow(x), node)
        small = lower_linear(self.linears, linear, self.precision.narrow(x, shift), node, biased=False)
        y = self.precision.scaled(self.precision.wide(small), shift)
        if not linear.bias:
            return y
        return self.binary("Add", y, self.precision.wide(self.bias(linear)), f"{node}/bias_outside")

    def group(self, linears: Sequence[Linear], x: ir.Value, node: str) -> list[ir.Value]:
        """Each of ``linears`` of the same x; nodes are called ``node``/<last part of the linear's name>."""
        nodes = [f"{node}/{stem(linear.name)}" for linear in linears]
        if any(linear.name in self.islands.shifts for linear in linears):
            return [self.linear(linear, x, name) for linear, name in zip(linears, nodes, strict=True)]
        return lower_group(self.linears, linears, self.precision.narrow(x), nodes)

    def bias(self, linear: Linear) -> ir.Value:
        """The bias of ``linear``, (out,) in the graph's dtype."""
        name = f"{linear.name}.bias"
        self.weights.expect(name, (linear.out_features,))
        return self.builder.initializer(self.weights.tensor(name))

    def norm(self, norm: Norm, x: ir.Value, node: str) -> ir.Value:
        """Norm over the last axis of x (…, n), in the graph's dtype or in float32 as the dialect's norm leaves it.

        Its statistics are float32 whatever the graph's dtype. Raises CheckpointError when a tensor has another size.
        """
        features = dims(x)[-1]
        assert isinstance(features, int)  # features are never symbolic
        scale = self._scale(norm, features)
        if norm.kind == "rms":
            return NORMS[self.dialect.norm](self.builder, self.precision, x, scale, norm.eps, node)
        shift = None
        if norm.bias is not None:
            self.weights.expect(norm.bias, (features,))
            shift = self.builder.initializer(self.weights.tensor(norm.bias))
        return LAYER_NORM[self.dialect.norm](self.builder, self.precision, x, scale, shift, norm.eps, node)

    def binary(self, op_type: str, a: ir.Value, b: ir.Value, node: str) -> ir.Value:
        """An elementwise operation whose result has type and shape of ``a``."""
        return elementwise.binary(self.builder, op_type, a, b, node)

    def scaled(self, x: ir.Value, factor: float, node: str) -> ir.Value:
        """x · factor in the dtype of x; no node where the factor is 1."""
        return elementwise.scaled(self.builder, x, factor, node)

    def parts(self, x: ir.Value, sizes: Sequence[int], node: str) -> list[ir.Value]:
        """X cut along its last axis into ``sizes``."""
        lead: list[Dim] = dims(x)[:-1]
        label = "_".join(str(size) for size in sizes)
        cut = self.builder.constant(np.array(sizes, np.int64), f"sizes_{label}")
        outputs = [(type_of(x), [*lead, size]) for size in sizes]
        return list(self.builder.ops("Split", [x, cut], name=node, outputs=outputs, axis=-1))

    def _scale(self, norm: Norm, features: int) -> ir.Value:
        self.weights.expect(norm.weight, (features,))
        if norm.offset == 0.0:
            return self.builder.initializer(self.weights.tensor(norm.weight))

        def shifted(load: Any) -> np.ndarray[Any, Any]:
            return np.asarray(load(norm.weight), np.float64) + norm.offset

        name = f"{norm.weight}/plus_{norm.offset:g}"
        return self.builder.initializer(self.weights.derived(name, (features,), [norm.weight], shifted))


def stem(name: str) -> str:
    """Last part of a module path."""
    return name.rsplit(".", 1)[-1]
