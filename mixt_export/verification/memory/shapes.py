"""Shapes of every value of a graph at one chosen input shape: abstract interpretation, node by node.

onnx's own inference knows the standard operators; the runtime's operators are in `CONTRIB`. Small integer tensors
(shapes, axes, positions) are computed along, because Reshape, Slice and Range need their values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from mixt_export.errors import UnsupportedError

_SMALL = 4096
_MAX_ELEMENTS = 1 << 48

#: How exporters call the free dimensions -> our name.
DIMENSIONS = {
    "batch": "batch", "batch_size": "batch",
    "seq": "seq", "sequence_length": "seq", "sequence": "seq",
    "total": "total", "total_sequence_length": "total",
    "past": "past", "past_sequence_length": "past", "past_seq": "past",
}  # fmt: skip


@dataclass(frozen=True)
class Tensor:
    """ONNX element type, concrete shape, and whether it is known before any input is (weights and what follows)."""

    element: int
    shape: tuple[int, ...]
    constant: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * onnx.helper.tensor_dtype_to_np_dtype(self.element).itemsize


@dataclass
class Shapes:
    """``tensors`` by value name; ``graph`` with model-local functions inlined, whose nodes they belong to."""

    graph: onnx.GraphProto
    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, NDArray[Any]] = field(default_factory=dict)


def infer_shapes(proto: onnx.ModelProto, sizes: Mapping[str, int]) -> Shapes:
    """Interpret ``proto`` with free dimensions ``sizes`` (batch, seq, total, past).

    Raises UnsupportedError naming the node or dimension that cannot be inferred.
    """
    model = _inlined(proto)
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    shapes = Shapes(model.graph)
    for tensor in model.graph.initializer:
        shapes.tensors[tensor.name] = Tensor(tensor.data_type, tuple(tensor.dims), constant=True)
        if math.prod(tensor.dims) <= _SMALL and tensor.data_location != onnx.TensorProto.EXTERNAL:
            shapes.values[tensor.name] = onnx.numpy_helper.to_array(tensor)
    for value in model.graph.input:
        if value.name not in shapes.tensors:
            shapes.tensors[value.name] = _input(value, sizes)
    for node in model.graph.node:
        _interpret(node, shapes, opsets, list(model.opset_import))
    return shapes


def _inlined(proto: onnx.ModelProto) -> onnx.ModelProto:
    if not proto.functions:
        return proto
    import onnx.inliner

    # The inliner leaves functions of another opset alone. Bodies are written for an older one so that they run
    # anywhere; the shapes of what they use are the same in the graph's.
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    versions = {entry.domain: entry.version for entry in proto.opset_import}
    for function in copy.functions:
        for entry in function.opset_import:
            entry.version = versions.get(entry.domain, entry.version)
    return onnx.inliner.inline_local_functions(copy)


def _input(value: onnx.ValueInfoProto, sizes: Mapping[str, int]) -> Tensor:
    shape = []
    for dim in value.type.tensor_type.shape.dim:
        if not dim.dim_param:
            shape.append(dim.dim_value)
        elif DIMENSIONS.get(dim.dim_param) in sizes:
            shape.append(sizes[DIMENSIONS[dim.dim_param]])
        else:
            raise UnsupportedError(
                f"input {value.name!r} has a dimension {dim.dim_param!r} that memory prediction does not know; "
                f"it knows {', '.join(sorted(DIMENSIONS))}."
            )
    return Tensor(value.type.tensor_type.elem_type, tuple(shape))


def _interpret(
    node: onnx.NodeProto, shapes: Shapes, opsets: Mapping[str, int], imports: list[onnx.OperatorSetIdProto]
) -> None:
    inputs = [shapes.tensors[name] for name in node.input if name]
    constant = all(tensor.constant for tensor in inputs)
    rule = CONTRIB.get(node.op_type)
    if rule is not None and node.domain == "com.microsoft":
        outputs = rule(node, [shapes.tensors[name] if name else None for name in node.input])
        inferred = dict(zip(node.output, outputs, strict=False))
    else:
        inferred = _standard(node, shapes, opsets, imports)
    for name in filter(None, node.output):
        if name not in inferred:
            raise UnsupportedError(
                f"node {node.name or node.op_type!r} ({node.op_type}): its shape cannot be inferred."
            )
        tensor = inferred[name]
        if math.prod(tensor.shape) > _MAX_ELEMENTS:
            raise UnsupportedError(f"node {node.name or node.op_type!r} ({node.op_type}): absurd shape {tensor.shape}.")
        shapes.tensors[name] = Tensor(tensor.element, tensor.shape, constant)
    _evaluate(node, shapes, opsets)


def _standard(
    node: onnx.NodeProto, shapes: Shapes, opsets: Mapping[str, int], imports: list[onnx.OperatorSetIdProto]
) -> dict[str, Tensor]:
    if node.domain not in ("", "ai.onnx") or any(attribute.HasField("g") for attribute in node.attribute):
        raise UnsupportedError(
            f"node {node.name or node.op_type!r}: memory prediction does not know operator "
            f"{node.domain or 'ai.onnx'}::{node.op_type}."
        )
    schema = onnx.defs.get_schema(node.op_type, opsets.get(node.domain, opsets.get("", 1)), "")
    types = {
        name: onnx.helper.make_tensor_type_proto(shapes.tensors[name].element, shapes.tensors[name].shape)
        for name in node.input
        if name
    }
    data = {
        name: onnx.numpy_helper.from_array(np.asarray(shapes.values[name]), name)
        for name in node.input
        if name in shapes.values
    }
    try:
        found = onnx.shape_inference.infer_node_outputs(schema, node, types, data, opset_imports=imports)
    except Exception as error:  # onnx raises several unrelated classes here
        raise UnsupportedError(f"node {node.name or node.op_type!r} ({node.op_type}): {error}") from error
    inferred = {}
    for name, value in found.items():
        tensor = value.tensor_type
        if tensor.HasField("shape") and all(dim.HasField("dim_value") for dim in tensor.shape.dim):
            inferred[name] = Tensor(tensor.elem_type, tuple(dim.dim_value for dim in tensor.shape.dim))
    return inferred


def _evaluate(node: onnx.NodeProto, shapes: Shapes, opsets: Mapping[str, int]) -> None:
    """Keep the value of a small result whose inputs' values are all known."""
    outputs = [shapes.tensors[name] for name in node.output if name]
    if any(math.prod(tensor.shape) > _SMALL for tensor in outputs) or node.domain not in ("", "ai.onnx"):
        return
    if node.op_type == "Shape":
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        shape = shapes.tensors[node.input[0]].shape[attributes.get("start", 0) : attributes.get("end")]
        shapes.values[node.output[0]] = np.array(shape, np.int64)
        return
    names = [name for name in node.input if name]
    if any(name not in shapes.values for name in names):
        return
    from onnx.reference import ReferenceEvaluator

    values = ReferenceEvaluator(node, opsets=dict(opsets)).run(None, {name: shapes.values[name] for name in names})
    shapes.values.update({name: np.asarray(value) for name, value in zip(node.output, values, strict=True) if name})


Rule = Callable[[onnx.NodeProto, list[Tensor | None]], list[Tensor]]


def _known(tensor: Tensor | None, node: onnx.NodeProto) -> Tensor:
    if tensor is None:
        raise UnsupportedError(f"node {node.name or node.op_type!r} ({node.op_type}): an input is missing.")
    return tensor


def attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    """Integer attribute of ``node``."""
    return next((int(entry.i) for entry in node.attribute if entry.name == name), default)


def _like_first(node: onnx.NodeProto, inputs: list[Tensor | None]) -> list[Tensor]:
    return [_known(inputs[0], node)] * len(node.output)


def _skip_norm(node: onnx.NodeProto, inputs: list[Tensor | None]) -> list[Tensor]:
    """Outputs: the norm, two statistics that are not used in inference, the sum."""
    first = _known(inputs[0], node)
    statistic = Tensor(onnx.TensorProto.FLOAT, (*first.shape[:-1], 1))
    return [first, statistic, statistic, first]


def _grouped_attention(node: onnx.NodeProto, inputs: list[Tensor | None]) -> list[Tensor]:
    """Query (batch, seq, hidden), or query, key and value packed; present holds past and the new keys."""
    query, past = _known(inputs[0], node), _known(inputs[3], node)
    heads, kv_heads = attribute(node, "num_heads", 1), attribute(node, "kv_num_heads", 1)
    head_dim = past.shape[3]
    batch, seq = query.shape[:2]
    present = Tensor(past.element, (batch, kv_heads, past.shape[2] + seq, head_dim))
    return [Tensor(query.element, (batch, seq, heads * head_dim)), present, present]


def _fused_matmul(node: onnx.NodeProto, inputs: list[Tensor | None]) -> list[Tensor]:
    left, right = _known(inputs[0], node), _known(inputs[1], node)
    a = (*left.shape[:-2], left.shape[-1], left.shape[-2]) if attribute(node, "transA", 0) else left.shape
    b = (*right.shape[:-2], right.shape[-1], right.shape[-2]) if attribute(node, "transB", 0) else right.shape
    stack = np.broadcast_shapes(a[:-2], b[:-2])
    return [Tensor(left.element, (*stack, a[-2], b[-1]))]


def _nbits(node: onnx.NodeProto, inputs: list[Tensor | None]) -> list[Tensor]:
    left = _known(inputs[0], node)
    return [Tensor(left.element, (*left.shape[:-1], attribute(node, "N", 0)))]


CONTRIB: dict[str, Rule] = {
    "GroupQueryAttention": _grouped_attention,
    "FusedMatMul": _fused_matmul,
    "MatMulNBits": _nbits,
    "RotaryEmbedding": _like_first,
    "QuickGelu": _like_first,
    "SimplifiedLayerNormalization": _like_first,
    "SkipSimplifiedLayerNormalization": _skip_norm,
}
