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

from mixt_export.errors import MixtError, UnsupportedError

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
    """``tensors`` by value name; ``graph`` with model-local functions inlined, whose nodes they belong to.

    ``bodies``: name of a Loop or If -> the same for its body, or the branch that runs, which knows the values outside
    of it too.
    """

    graph: onnx.GraphProto
    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, NDArray[Any]] = field(default_factory=dict)
    bodies: dict[str, Shapes] = field(default_factory=dict)


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
        try:
            _interpret(node, shapes, opsets, list(model.opset_import))
        except MixtError:
            raise
        except Exception as error:  # rules index and compute with what the graph says, which may be anything
            raise UnsupportedError(
                f"node {node.name or node.op_type!r} ({node.op_type}): contradicts the graph around it "
                f"({type(error).__name__}: {' '.join(str(error).split())[:200]}); export the model again."
            ) from error
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
    at_runtime = _AT_RUNTIME.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    settled = at_runtime(node, shapes, opsets, imports) if at_runtime is not None else None
    if settled is not None:
        return settled
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


def _split(node: onnx.NodeProto, shapes: Shapes, *_: Any) -> dict[str, Tensor] | None:
    """Pieces whose sizes are made while the graph runs: all in the first, which is one of the possible cases.

    The pieces together have the size of the whole whatever the case, and so has what is computed of them.
    """
    if len(node.input) < 2 or not node.input[1] or node.input[1] in shapes.values:
        return None
    whole = shapes.tensors[node.input[0]]
    axis = attribute(node, "axis", 0) % len(whole.shape)
    none = (*whole.shape[:axis], 0, *whole.shape[axis + 1 :])
    return {name: Tensor(whole.element, whole.shape if index == 0 else none) for index, name in enumerate(node.output)}


def _loop(
    node: onnx.NodeProto, shapes: Shapes, opsets: Mapping[str, int], imports: list[onnx.OperatorSetIdProto]
) -> dict[str, Tensor]:
    """A loop without carried values, whose number of passes is known: what each pass gives, one after the other."""
    body = next(entry.g for entry in node.attribute if entry.name == "body")
    trips = shapes.values.get(node.input[0])
    if trips is None or len(body.input) != 2:
        raise UnsupportedError(f"node {node.name!r} (Loop): memory prediction needs to know its passes beforehand.")
    inside = Shapes(body, dict(shapes.tensors), dict(shapes.values))
    inside.tensors[body.input[0].name] = Tensor(onnx.TensorProto.INT64, ())
    inside.tensors[body.input[1].name] = Tensor(onnx.TensorProto.BOOL, ())
    for entry in body.node:
        _interpret(entry, inside, opsets, imports)
    shapes.bodies[node.name] = inside
    made = [inside.tensors[value.name] for value in body.output[1:]]
    return {
        name: Tensor(tensor.element, (int(trips), *tensor.shape))
        for name, tensor in zip(node.output, made, strict=True)
    }


def _if(
    node: onnx.NodeProto, shapes: Shapes, opsets: Mapping[str, int], imports: list[onnx.OperatorSetIdProto]
) -> dict[str, Tensor]:
    """The branch that runs at these sizes; its condition has to follow from them."""
    condition = shapes.values.get(node.input[0])
    if condition is None:
        raise UnsupportedError(f"node {node.name!r} (If): memory prediction needs to know its condition beforehand.")
    wanted = "then_branch" if bool(condition) else "else_branch"
    branch = next(entry.g for entry in node.attribute if entry.name == wanted)
    inside = Shapes(branch, dict(shapes.tensors), dict(shapes.values))
    for entry in branch.node:
        _interpret(entry, inside, opsets, imports)
    shapes.bodies[node.name] = inside
    made = [inside.tensors[value.name] for value in branch.output]
    return {name: Tensor(tensor.element, tensor.shape) for name, tensor in zip(node.output, made, strict=True)}


#: Standard operators whose results depend on more than the inputs' shapes and small values; None: as onnx says.
_AT_RUNTIME: dict[str, Callable[..., dict[str, Tensor] | None]] = {"Split": _split, "Loop": _loop, "If": _if}


def _evaluate(node: onnx.NodeProto, shapes: Shapes, opsets: Mapping[str, int]) -> None:
    """Keep the value of a small result whose inputs' values are all known."""
    outputs = [shapes.tensors[name] for name in node.output if name]
    if any(math.prod(tensor.shape) > _SMALL for tensor in outputs) or node.domain not in ("", "ai.onnx"):
        return
    if node.op_type in ("Loop", "If"):  # its body may read what is known outside of it only by shape
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


def _dynamic(node: onnx.NodeProto, inputs: list[Tensor | None]) -> list[Tensor]:
    left, right = _known(inputs[0], node), _known(inputs[1], node)
    return [Tensor(left.element, (*left.shape[:-1], right.shape[-1]))]


def _rows_of_blocks(node: onnx.NodeProto, inputs: list[Tensor | None]) -> list[Tensor]:
    """Rows (vocab, features packed) picked by indices of any shape, in the type of their scales."""
    data, index, scales = (_known(tensor, node) for tensor in inputs[:3])
    packed = 8 // attribute(node, "bits", 4)
    return [Tensor(scales.element, (*index.shape, data.shape[-1] * packed))]


CONTRIB: dict[str, Rule] = {
    "DynamicQuantizeMatMul": _dynamic,
    "GroupQueryAttention": _grouped_attention,
    "FusedMatMul": _fused_matmul,
    "GatherBlockQuantized": _rows_of_blocks,
    "MatMulNBits": _nbits,
    "RotaryEmbedding": _like_first,
    "QuickGelu": _like_first,
    "SimplifiedLayerNormalization": _like_first,
    "SkipSimplifiedLayerNormalization": _skip_norm,
}
