"""Calls of functions that are nothing but products become those products, so that each can be written its own way."""

from __future__ import annotations

import onnx_ir as ir

from mixt_export.lower.builder import MIXT_DOMAIN, Dim
from mixt_export.lower.decoder import LoweredModel
from mixt_export.lower.precision import dims

_INNER = ("MatMul", "Add")


def open_products(lowered: LoweredModel) -> None:
    """Put the nodes of its body in place of every call of a function of products with matrices, and of a bias.

    The functions stay, for what writes the quantised graph to drop.
    """
    fitting = {
        identifier: function
        for identifier, function in lowered.model.functions.items()
        if identifier[0] == MIXT_DOMAIN and all(node.op_type in _INNER and not node.domain for node in function)
    }
    for node in list(lowered.model.graph):
        function = fitting.get(node.op_identifier())
        if function is not None:
            _open(node, function)


def _open(call: ir.Node, function: ir.Function) -> None:
    """The body of ``function``, its nodes named below ``call``, whose output keeps its name."""
    known: dict[ir.Value, ir.Value] = {}
    for formal, actual in zip(function.inputs, call.inputs, strict=True):
        assert actual is not None
        known[formal] = actual
    made = []
    (old,) = call.outputs
    for index, inner in enumerate(function):
        inputs = [known[value] for value in inner.inputs if value is not None]
        name = f"{call.name}/{inner.name or index}"
        shape: list[Dim] = dims(inputs[0])
        if inner.op_type == "MatMul":
            shape = [*shape[:-1], dims(inputs[1])[-1]]
        result = ir.Value(name=f"{name}/output_0", type=old.type, shape=ir.Shape(shape))
        known[inner.outputs[0]] = result
        made.append(ir.node(inner.op_type, inputs, name=name, outputs=[result]))
    new = known[function.outputs[0]]
    new.name = old.name
    assert call.graph is not None
    ir.convenience.replace_nodes_and_values(call.graph, call, [call], made, [old], [new])
