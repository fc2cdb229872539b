"""Multiply-adds that a written graph executes, node by node, from its operators and shapes: not from any plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnx

from mixt_export.verification.memory.shapes import Shapes, Tensor, infer_shapes

_TOKENS = 8


@dataclass(frozen=True)
class NodeWork:
    """One node of the main graph: multiply-adds per token of its matrix products, and how many it and its body hold."""

    name: str
    operator: str
    macs: int
    products: int
    transposes: int


def graph_work(proto: onnx.ModelProto) -> list[NodeWork]:
    """Work of every node that multiplies by a weight, functions with their bodies, in the order of execution.

    Attention is left out: its work depends on the cache. Raises UnsupportedError as ``infer_shapes``.
    """
    shapes = infer_shapes(proto, {"batch": 1, "seq": _TOKENS, "total": _TOKENS, "past": 0})
    bodies = {(function.domain, function.name): len(function.node) for function in proto.functions}
    inlined = iter(shapes.graph.node)
    found = []
    for node in proto.graph.node:
        count = bodies.get((node.domain, node.op_type), 1)
        executed = [next(inlined) for _ in range(count)]
        macs = [_macs(each, shapes) for each in executed]
        if any(macs):
            transposes = sum(each.op_type == "Transpose" and _moves(each, shapes) for each in executed)
            found.append(NodeWork(node.name, node.op_type, sum(macs) // _TOKENS, sum(map(bool, macs)), transposes))
    return found


def _moves(node: onnx.NodeProto, shapes: Shapes) -> bool:
    return not shapes.tensors[node.input[0]].constant


def _macs(node: onnx.NodeProto, shapes: Shapes) -> int:
    """Multiply-adds of ``node`` for all tokens; 0 where it is no product with a constant."""
    rule = _RULES.get(node.op_type)
    inputs = [shapes.tensors[name] for name in node.input if name]
    if rule is None or sum(tensor.constant for tensor in inputs[:2]) != 1:
        return 0
    return rule(node, inputs, shapes.tensors[node.output[0]].shape)


def _product(node: onnx.NodeProto, inputs: Sequence[Tensor], result: tuple[int, ...]) -> int:
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    return math.prod(result) * inputs[0].shape[-2 if attributes.get("transA") else -1]


def _einsum(node: onnx.NodeProto, inputs: Sequence[Tensor], _result: tuple[int, ...]) -> int:
    equation = next(attribute.s.decode() for attribute in node.attribute if attribute.name == "equation")
    sizes: dict[str, int] = {}
    for labels, tensor in zip(equation.partition("->")[0].split(","), inputs, strict=True):
        sizes.update(zip(labels.strip(), tensor.shape, strict=True))
    return math.prod(sizes.values())


_RULES: Mapping[str, Callable[[onnx.NodeProto, Sequence[Tensor], tuple[int, ...]], int]] = {
    "MatMul": _product,
    "FusedMatMul": _product,
    "MatMulNBits": _product,
    "DynamicQuantizeMatMul": _product,
    "Gemm": _product,
    "Einsum": _einsum,
}
