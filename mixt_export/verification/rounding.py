"""Run a 16-bit graph as it is typed: float32 arithmetic, and every value that the graph calls 16-bit rounded to it.

ONNX Runtime's CPU computes neither in bfloat16 nor, mostly, in float16: it widens operands and keeps the wide result
between two operators, so what would overflow on a device does not overflow there. A strongly typed engine rounds every
value. With casts of our own each value is rounded here too; products are accumulated in float32, as tensor cores do.
What this proves is the graph as written: its wiring, its weights as rounded, the place of every rounding. The kernels
of a device, and what happens inside one operator, are not part of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx
from onnx import TensorProto, helper

from mixt_export.errors import UnsupportedError

_FLOAT = TensorProto.FLOAT
_NARROW = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
#: Operators that only move values: what went in rounded comes out rounded.
_MOVES = frozenset(
    {"Concat", "Expand", "Gather", "Identity", "Pad", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}
)


def rounding(proto: onnx.ModelProto, dtype: str) -> onnx.ModelProto:
    """A copy of ``proto`` that stores ``dtype`` ("float16", "bfloat16") but never computes with it.

    Inputs and outputs of ``dtype`` become float32. Initializers stay as they are, in place, and are widened by a Cast.
    Functions are inlined; bodies of loops are treated as the graph is. Raises UnsupportedError for a value
    whose type cannot be inferred.
    """
    element = _NARROW[dtype]
    model = _inlined(proto)
    graph = model.graph
    wide = {t.name: f"{t.name}/as_float32" for t in graph.initializer if t.data_type == element}
    widened = [_cast(name, result, _FLOAT) for name, result in wide.items()]
    _round(graph, _values_of(model, element), wide, element, widened)
    return model


def _round(
    graph: onnx.GraphProto,
    narrow: set[str],
    wide: Mapping[str, str],
    element: int,
    first: Sequence[onnx.NodeProto] = (),
) -> None:
    """Round the values ``narrow`` of ``graph`` and of the bodies in it; ``first``: nodes to put before all others."""
    nodes = list(first)
    for node in graph.node:
        for body in _bodies(node):
            _round(body, narrow, wide, element)
        node.input[:] = [wide.get(name, name) for name in node.input]
        rounds = [name for name in node.output if name in narrow and node.op_type not in _MOVES]
        node.output[:] = [f"{name}/unrounded" if name in rounds else name for name in node.output]
        if node.op_type == "Cast":
            for entry in node.attribute:
                entry.i = _FLOAT if entry.name == "to" and entry.i == element else entry.i
        nodes.append(node)
        for name in rounds:
            nodes.append(_cast(f"{name}/unrounded", f"{name}/rounded", element))
            nodes.append(_cast(f"{name}/rounded", name, _FLOAT))
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == element:
            value.type.tensor_type.elem_type = _FLOAT
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(copies)


def _bodies(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    return [entry.g for entry in node.attribute if entry.type == onnx.AttributeProto.GRAPH]


def _inlined(proto: onnx.ModelProto) -> onnx.ModelProto:
    import onnx.inliner

    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    # The inliner leaves functions of another opset alone; what bodies use means the same in the graph's.
    versions = {entry.domain: entry.version for entry in proto.opset_import}
    for function in copy.functions:
        for entry in function.opset_import:
            entry.version = versions.get(entry.domain, entry.version)
    return onnx.inliner.inline_local_functions(copy) if copy.functions else copy


def _values_of(model: onnx.ModelProto, element: int) -> set[str]:
    """Names of node outputs of type ``element``, in the graph and in the bodies of loops.

    Raises UnsupportedError where a type is not known: such a value would stay unrounded without a word.
    """
    typed = onnx.shape_inference.infer_shapes(model, strict_mode=False, data_prop=False)
    found: set[str] = set()
    graphs = [typed.graph]
    while graphs:
        graph = graphs.pop()
        values = (*graph.value_info, *graph.output)
        types = {value.name: value.type.tensor_type.elem_type for value in values}
        for node in graph.node:
            _require_types(node, types)
        found |= {name for name, kind in types.items() if kind == element}
        graphs += [body for node in graph.node for body in _bodies(node)]
    return found


def _require_types(node: onnx.NodeProto, types: Mapping[str, int]) -> None:
    for name in node.output:
        if name and not types.get(name):
            raise UnsupportedError(
                f"node {node.name!r} ({node.domain or 'ai.onnx'}::{node.op_type}): the type of its output {name!r} "
                "cannot be inferred, so it is not known whether an engine would round it; export the model again."
            )


def _cast(source: str, result: str, element: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [result], name=result, to=element)
