"""Predict what a run needs: weights, key-value cache, activations by liveness over the graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx

from mixt_export.errors import UsageError
from mixt_export.verification.memory.shapes import Shapes, Tensor, attribute, infer_shapes
from mixt_export.verification.memory.weights import count_weights

_CACHE = ("past_key_values.", "present.")
#: Results that are the input's bytes under another shape.
_VIEWS = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity"})
#: Elementwise operators: onnxruntime writes the result over an input that nobody needs any more.
_IN_PLACE = frozenset(
    {"Add", "Sub", "Mul", "Div", "Sigmoid", "Tanh", "Relu", "Sqrt", "Reciprocal", "Neg", "Exp", "Softmax", "Swish"}
)


@dataclass(frozen=True)
class MemoryPrediction:
    """Bytes that one run of a graph needs at one shape.

    ``activations``: the most that live intermediate values occupy at once, ``peak_node`` where that is. Views cost
    nothing and elementwise results reuse a dying input, as in onnxruntime. ``workspace``: the attention scores of the
    largest attention node, (batch, heads, seq, total) float32, which CPU kernels hold on top. ``kv_cache``: keys and
    values of ``total`` positions, once (dialect portable holds past and present at the same time: twice).
    """

    batch: int
    seq: int
    total: int
    weights: int
    kv_bytes_per_token: int
    kv_cache: int
    activations: int
    workspace: int
    peak_node: str

    @property
    def sum(self) -> int:
        """Weights, cache, activations and workspace together."""
        return self.weights + self.kv_cache + self.activations + self.workspace


def predict_memory(model: Path | onnx.ModelProto, *, batch: int = 1, seq: int = 1, total: int = 1) -> MemoryPrediction:
    """Predict for ``batch`` sequences of ``seq`` new tokens with ``total`` positions in the cache afterwards.

    ``model``: model.onnx, an exported folder, or a proto with or without its weights; weights are not read.
    Raises UsageError for impossible sizes, UnsupportedError naming a node whose shape cannot be told.
    """
    if not (batch >= 1 and 1 <= seq <= total):
        raise UsageError(
            f"memory prediction for batch {batch}, seq {seq}, total {total}: need batch ≥ 1, 1 ≤ seq ≤ total."
        )
    proto = _load(model)
    shapes = infer_shapes(proto, {"batch": batch, "seq": seq, "total": total, "past": total - seq})
    activations, node = _activation_peak(shapes)
    per_token = _kv_bytes_per_token(proto)
    return MemoryPrediction(
        batch=batch,
        seq=seq,
        total=total,
        weights=count_weights(proto).nbytes,
        kv_bytes_per_token=per_token,
        kv_cache=batch * total * per_token,
        activations=activations,
        workspace=max((_workspace(node, shapes, total) for node in shapes.graph.node), default=0),
        peak_node=node,
    )


def _load(model: Path | onnx.ModelProto) -> onnx.ModelProto:
    if isinstance(model, onnx.ModelProto):
        return model
    path = model / "model.onnx" if model.is_dir() else model
    try:
        return onnx.load_model(str(path), load_external_data=False)
    except Exception as error:  # protobuf's and the file system's classes
        raise UsageError(f"{path}: is not a readable ONNX model ({type(error).__name__}); export again.") from error


def _kv_bytes_per_token(proto: onnx.ModelProto) -> int:
    nbytes = 0
    for value in proto.graph.input:
        if value.name.startswith(_CACHE[0]):
            tensor = value.type.tensor_type
            heads, head_dim = tensor.shape.dim[1].dim_value, tensor.shape.dim[3].dim_value
            nbytes += Tensor(tensor.elem_type, (heads, head_dim)).nbytes
    return nbytes


def _activation_peak(shapes: Shapes) -> tuple[int, str]:
    """The largest sum of live buffers, and the node at which it occurs; nodes are in topological order."""
    nodes = shapes.graph.node
    outputs = {value.name for value in shapes.graph.output}
    reads = [_reads(node) for node in nodes]
    last_use = {name: index for index, names in enumerate(reads) for name in names}
    last_use.update(dict.fromkeys(outputs, len(nodes)))
    buffers = _Buffers(shapes)
    for value in shapes.graph.input:
        buffers.add(value.name)
    peak, peak_node = 0, ""
    for index, node in enumerate(nodes):
        dying = [name for name in dict.fromkeys(reads[index]) if last_use.get(name) == index]
        body = shapes.bodies.get(node.name)
        inside, inner_node = (0, "") if body is None else _activation_peak(body)
        if buffers.nbytes + inside > peak:
            peak, peak_node = buffers.nbytes + inside, inner_node
        for output in filter(None, node.output):
            buffers.place(node, output, dying)
        if buffers.nbytes > peak:
            peak, peak_node = buffers.nbytes, node.name or node.op_type
        unused = [name for name in node.output if name not in last_use]
        for name in (*dying, *unused):
            buffers.drop(name)
    return peak, peak_node


def _reads(node: onnx.NodeProto) -> list[str]:
    """Values that a node reads, those that the body of a loop takes from outside included."""
    names = list(node.input)
    for entry in node.attribute:
        if entry.type == onnx.AttributeProto.GRAPH:
            names += [name for inner in entry.g.node for name in _reads(inner)]
    return names


class _Buffers:
    """Live buffers; several values may lie in one. Weights and the cache are counted elsewhere: here they are 0."""

    def __init__(self, shapes: Shapes) -> None:
        self._shapes = shapes
        self._buffer_of: dict[str, str] = {}
        self._values: dict[str, set[str]] = {}
        self._size: dict[str, int] = {}
        self.nbytes = 0

    def add(self, name: str) -> None:
        """A buffer of its own for ``name``."""
        tensor = self._shapes.tensors[name]
        self._buffer_of[name] = name
        self._values[name] = {name}
        self._size[name] = 0 if tensor.constant or name.startswith(_CACHE) else tensor.nbytes
        self.nbytes += self._size[name]

    def place(self, node: onnx.NodeProto, output: str, dying: list[str]) -> None:
        """Put ``output`` of ``node`` into an input's buffer if the runtime would, else into a new one."""
        host = None
        if node.op_type in _VIEWS:
            host = self._buffer_of.get(node.input[0])
        elif node.op_type in _IN_PLACE:
            host = next((found for name in dying if (found := self._reusable(name, output))), None)
        if host is None or output.startswith(_CACHE):
            self.add(output)
            return
        self._buffer_of[output] = host
        self._values[host].add(output)

    def _reusable(self, name: str, output: str) -> str | None:
        buffer = self._buffer_of.get(name)
        if buffer is None or self._values[buffer] != {name} or name.startswith(_CACHE):
            return None
        return buffer if self._size[buffer] == self._shapes.tensors[output].nbytes else None

    def drop(self, name: str) -> None:
        """``name`` is not needed any more; its buffer goes with its last value."""
        buffer = self._buffer_of.pop(name, None)
        if buffer is None:
            return
        self._values[buffer].discard(name)
        if not self._values[buffer]:
            self.nbytes -= self._size[buffer]


def _scores(node: onnx.NodeProto, shapes: Shapes, total: int) -> int:
    """Attention scores (batch, heads, seq, total) in float32."""
    query = shapes.tensors[node.input[0]].shape
    heads = query[1] if len(query) == 4 else attribute(node, _HEADS[node.op_type], 1)
    seq = query[2] if len(query) == 4 else query[1]
    return 4 * query[0] * heads * seq * total


_HEADS = {"GroupQueryAttention": "num_heads", "Attention": "q_num_heads"}
_WORKSPACE: dict[str, Callable[[onnx.NodeProto, Shapes, int], int]] = dict.fromkeys(_HEADS, _scores)


def _workspace(node: onnx.NodeProto, shapes: Shapes, total: int) -> int:
    rule = _WORKSPACE.get(node.op_type)
    return rule(node, shapes, total) if rule else 0
