"""A small builder over onnx-ir: every node is named, every value carries its dtype and symbolic shape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx_ir as ir

from mixt_export.errors import MixtError

Dim = int | str
IR_VERSION = 10

#: What model-local functions may use; they are written in standard ONNX of this opset or older.
MIXT_DOMAIN = "mixt"
MICROSOFT_DOMAIN = "com.microsoft"


class GraphBuilder:
    """Collects inputs, nodes, initializers and functions of one graph."""

    def __init__(self, name: str, opset: int, ir_version: int = IR_VERSION) -> None:
        self.name, self.ir_version = name, ir_version
        self.opsets: dict[str, int] = {"": opset}
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []
        self._nodes: list[ir.Node] = []
        self._initializers: dict[str, ir.Value] = {}
        self._functions: dict[tuple[str, str, str], ir.Function] = {}

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[Dim]) -> ir.Value:
        """Declare a graph input."""
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(list(shape)))
        self._inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str) -> None:
        """Declare ``value`` a graph output called ``name``."""
        value.name = name
        self._outputs.append(value)

    def initializer(self, tensor: ir.TensorProtocol) -> ir.Value:
        """Register ``tensor`` (its name is the key) once and return its value."""
        name = str(tensor.name)
        if name not in self._initializers:
            self._initializers[name] = ir.Value(
                name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
            )
        return self._initializers[name]

    def constant(self, array: np.ndarray[Any, Any], name: str) -> ir.Value:
        """A small constant stored in the model file itself; a name stands for one value throughout the graph.

        Raises MixtError (internal error) when ``name`` already stands for another value.
        """
        known = self._initializers.get(f"/constants/{name}")
        if known is None:
            return self.initializer(ir.tensor(array, name=f"/constants/{name}"))
        assert known.const_value is not None  # this method gives every constant its value
        if not np.array_equal(known.const_value.numpy(), array):
            raise MixtError(f"the constant {name!r} stands for two values in one graph. Please report this.")
        return known

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        *,
        name: str,
        dtype: ir.DataType,
        shape: Sequence[Dim],
        domain: str = "",
        **attributes: Any,
    ) -> ir.Value:
        """Append a node with one output and return it."""
        return self.ops(op_type, inputs, name=name, outputs=[(dtype, shape)], domain=domain, **attributes)[0]

    def ops(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        *,
        name: str,
        outputs: Sequence[tuple[ir.DataType, Sequence[Dim]]],
        domain: str = "",
        **attributes: Any,
    ) -> Sequence[ir.Value]:
        """Append a node with several outputs, named ``<name>/output_<i>``."""
        if domain and domain not in self.opsets:
            self.opsets[domain] = 1
        values = [
            ir.Value(name=f"{name}/output_{index}", type=ir.TensorType(dtype), shape=ir.Shape(list(shape)))
            for index, (dtype, shape) in enumerate(outputs)
        ]
        node = ir.node(op_type, list(inputs), attributes=attributes, domain=domain, name=name, outputs=values)
        self._nodes.append(node)
        return values

    @contextmanager
    def body(self) -> Iterator[list[ir.Node]]:
        """While open, nodes go into the list it gives: of a Loop's body or an If's branch, which may read outside."""
        outside, inside = self._nodes, list[ir.Node]()
        self._nodes = inside
        try:
            yield inside
        finally:
            self._nodes = outside

    def function(self, function: ir.Function) -> None:
        """Carry ``function`` in the model, once."""
        self._functions.setdefault(function.identifier(), function)
        self.opsets.setdefault(function.domain, 1)

    def model(self, metadata: Mapping[str, str], producer_version: str) -> ir.Model:
        """The finished model. Functions only used by this graph travel with it."""
        graph = ir.Graph(
            self._inputs,
            self._outputs,
            nodes=self._nodes,
            initializers=list(self._initializers.values()),
            opset_imports=self.opsets,
            name=self.name,
        )
        return ir.Model(
            graph,
            ir_version=self.ir_version,
            producer_name="mixt-export",
            producer_version=producer_version,
            functions=list(self._functions.values()),
            metadata_props=dict(metadata),
        )
