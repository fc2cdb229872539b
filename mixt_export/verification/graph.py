"""The exported graph as data: what it is, and the same graph with its inner values made visible."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from mixt_export.checkpoints.paths import own_file
from mixt_export.checkpoints.store import TensorStore, read_tensors
from mixt_export.errors import UsageError

MODEL_FILE = "model.onnx"
#: Beside it: factors of matrices that were scaled before they were rounded.
SMOOTHING_FILE = "smoothing.safetensors"
LAST_POSITION = "/lm_head/last_position"
LOGITS = "logits"
#: Output of an encoder's block.
ENCODER_LAYER = "/encoder/layer.{}/output"
#: A graph without weights is a few hundred kB; a file beyond this is not one of ours.
_MAX_GRAPH_BYTES = 512 << 20
_LAYER_OUTPUT = re.compile(r"^/model/layers\.(\d+)/output$")
_ENCODER_LAYER_OUTPUT = re.compile(r"^/encoder/layer\.(\d+)/output$")
_PAST = re.compile(r"^past_key_values\.(\d+)\.key$")
_ELEMENT = {
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.BFLOAT16: "bfloat16",
}
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}


@dataclass(frozen=True)
class ExportedGraph:
    """An exported folder's graph without its weights, and the facts of it that verification needs."""

    folder: Path
    proto: onnx.ModelProto
    layers: int
    kv_heads: int
    head_dim: int
    dtype: str
    dialect: str
    emulated: bool = False
    """Round as typed whatever the target is."""
    int8_cache: bool = False
    """Keys and values are cached at 8 bits."""
    smoothing: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    """Factors of matrices and of cached values that were scaled before they were rounded, see docs/format.md."""

    @property
    def vocab_size(self) -> int:
        """Last dimension of the logits; 0 when the graph leaves it free."""
        logits = next(value for value in self.proto.graph.output if value.name == LOGITS)
        dims = logits.type.tensor_type.shape.dim
        return int(dims[-1].dim_value) if dims else 0

    @property
    def rounds(self) -> bool:
        """Whether to round every 16-bit value as typed: always at bfloat16; at float16 for engines that do so."""
        typed = self.emulated or self.dialect.startswith("trt")
        return self.dtype == "bfloat16" or (self.dtype == "float16" and typed)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one token adds to the key-value cache of one sequence."""
        return 2 * self.layers * self.kv_heads * self.head_dim * _BYTES[self.cache_dtype]

    @property
    def cache_dtype(self) -> str:
        """Of keys and values in the cache."""
        return "int8" if self.int8_cache else self.dtype


def open_graph(folder: Path) -> ExportedGraph:
    """Read ``folder``/model.onnx; the weights stay where they are.

    Raises UsageError when it is missing, unreadable or not a graph that follows docs/architecture.md.
    """
    proto, path = _read(folder), folder / MODEL_FILE
    inputs = {value.name: value.type.tensor_type for value in proto.graph.input}
    past = [inputs[name] for name in inputs if _PAST.match(name)]
    if not past or "input_ids" not in inputs or "attention_mask" not in inputs or not _has_logits(proto):
        raise UsageError(
            f"{path}: lacks input_ids, attention_mask, past_key_values.*.key or logits; "
            "give a decoder that `mixt export` wrote."
        )
    shape = past[0].shape.dim
    int8 = past[0].elem_type == onnx.TensorProto.INT8
    dtype = "float32" if int8 else _ELEMENT.get(past[0].elem_type)
    if len(shape) != 4 or dtype is None or not shape[1].dim_value or not shape[3].dim_value:
        raise UsageError(
            f"{path}: past_key_values.0.key must be float32, float16, bfloat16 or int8, of shape (batch, kv_heads, "
            "past, head_dim)."
        )
    heads, width = shape[1].dim_value, shape[3].dim_value
    return ExportedGraph(
        folder, proto, len(past), heads, width, dtype, _dialect(proto),
        int8_cache=int8, smoothing=_smoothing(folder, (1, heads, 1, width)),
    )  # fmt: skip


def _smoothing(folder: Path, cached: tuple[int, ...]) -> dict[str, NDArray[np.float32]]:
    """Factors by name, those of values in the cache of shape ``cached``; empty where nothing was smoothed.

    Raises UsageError for those that do not fit the cache.
    """
    path = own_file(folder, SMOOTHING_FILE)
    if path is None:
        return {}
    store = TensorStore(read_tensors(path))
    found = {name: store.read(name, "float32") for name in store}
    for name in [name for name in found if name.startswith("past_key_values.")]:
        if found[name].size != math.prod(cached):
            raise UsageError(f"{path}: {name} does not fit a cache of {cached[1]} heads of {cached[3]}; export again.")
        found[name] = found[name].reshape(cached)
    return found


def open_encoder_graph(folder: Path) -> ExportedGraph:
    """The same for an encoder: no cache, no logits. Raises UsageError as `open_graph`."""
    proto, path = _read(folder), folder / MODEL_FILE
    outputs = {value.name for value in proto.graph.output}
    inputs = {value.name for value in proto.graph.input}
    if not {"input_ids", "attention_mask"} <= inputs or not {"last_hidden_state", "sentence_embedding"} <= outputs:
        raise UsageError(
            f"{path}: lacks input_ids, attention_mask, last_hidden_state or sentence_embedding; "
            "give an encoder that `mixt export` wrote."
        )
    written = {entry.key: entry.value for entry in proto.metadata_props}
    found = [name for node in proto.graph.node for name in node.output if _ENCODER_LAYER_OUTPUT.match(name)]
    layers = len(found)
    if not found or set(found) != {ENCODER_LAYER.format(index) for index in range(layers)}:
        raise UsageError(f"{path}: has no outputs of blocks 0 to {max(layers - 1, 0)}; export again with this version.")
    dtype = written.get("mixt.dtype", "float32")
    if dtype not in _ELEMENT.values():
        raise UsageError(f"{path}: is of dtype {dtype!r}, which this version does not know; export again.")
    return ExportedGraph(folder, proto, layers, 0, 0, dtype, written.get("mixt.dialect", "portable"))


def _read(folder: Path) -> onnx.ModelProto:
    """model.onnx without its weights, its external paths checked.

    Raises CheckpointError where it is a link out of the folder, or no regular file.
    """
    path = own_file(folder, MODEL_FILE)
    if path is None:
        raise UsageError(f"{folder}: holds no {MODEL_FILE}; give a folder that `mixt export` wrote.")
    if path.stat().st_size > _MAX_GRAPH_BYTES:
        raise UsageError(f"{path}: {path.stat().st_size} bytes is too large for a graph without weights; export again.")
    try:
        proto = onnx.load_model(str(path), load_external_data=False)
    except Exception as error:  # protobuf raises its own DecodeError class, which moves between versions
        raise UsageError(f"{path}: is not a readable ONNX model ({type(error).__name__}); export again.") from error
    check_external_paths(proto, path)
    return proto


def _dialect(proto: onnx.ModelProto) -> str:
    """ "ort" by its attention, for graphs of others too; else as the exporter wrote it down, else "portable"."""
    if any(node.op_type == "GroupQueryAttention" for node in all_nodes(proto)):
        return "ort"
    written = next((entry.value for entry in proto.metadata_props if entry.key == "mixt.dialect"), "portable")
    return "portable" if written == "ort" else written


def all_nodes(proto: onnx.ModelProto) -> Iterable[onnx.NodeProto]:
    """Nodes of the graph and of its model-local functions."""
    yield from proto.graph.node
    for function in proto.functions:
        yield from function.node


def _tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor of a model: initializers, dense and sparse, and attributes, of functions and inner graphs too."""
    graphs = [proto.graph]
    nodes = [node for function in proto.functions for node in function.node]
    while graphs or nodes:
        for graph in graphs:
            nodes += graph.node
            yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield from (sparse.values, sparse.indices)
        attributes = [attribute for node in nodes for attribute in node.attribute]
        graphs, nodes = [], []
        for attribute in attributes:
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            graphs += [attribute.g, *attribute.graphs]


def check_external_paths(proto: onnx.ModelProto, path: Path) -> None:
    """Raise UsageError unless every weight file lies inside the model's folder."""
    root = path.parent.resolve()
    for tensor in _tensors(proto):
        location = next((entry.value for entry in tensor.external_data if entry.key == "location"), None)
        if location is None:
            continue
        target = (root / location).resolve()
        if root not in target.parents:
            raise UsageError(f"{path}: weight {tensor.name!r} points outside the folder ({location!r}); export again.")
        if not target.is_file():
            raise UsageError(f"{path}: weight {tensor.name!r} is in {location!r}, which is missing; export again.")


def instrument(graph: ExportedGraph, *, layers: bool = True, values: Sequence[str] | None = None) -> onnx.ModelProto:
    """The same nodes with the last-position node bypassed: ``logits`` becomes (batch, seq, vocab).

    With ``layers`` the residual stream after every block, (batch, seq, hidden), becomes an output too; ``values`` names
    other inner values instead. Nothing else changes, so what the instrumented graph computes is what the exported one
    computes before it picks a position.
    Raises UsageError when the graph does not use the names of docs/architecture.md.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(graph.proto)
    nodes = proto.graph.node
    picker = next((node for node in nodes if node.name == LAST_POSITION), None)
    if picker is None:
        raise UsageError(f"{graph.folder / MODEL_FILE}: has no node {LAST_POSITION!r}; export again with this version.")
    picked, everything = picker.output[0], picker.input[0]
    nodes.remove(picker)
    for node in nodes:
        for index, name in enumerate(node.input):
            if name == picked:
                node.input[index] = everything
    for value in proto.graph.value_info:  # their shapes hold for one position only, their types for all
        value.type.tensor_type.ClearField("shape")
    logits = next(value for value in proto.graph.output if value.name == LOGITS)
    element = logits.type.tensor_type.elem_type
    vocabulary = logits.type.tensor_type.shape.dim[-1].dim_value
    logits.CopyFrom(onnx.helper.make_tensor_value_info(LOGITS, element, ["batch", "seq", vocabulary or "vocab"]))
    if values is None:
        values = layer_outputs(graph) if layers else []
    _show(proto, values)
    return proto


def _show(proto: onnx.ModelProto, values: Sequence[str]) -> None:
    """Make inner ``values`` outputs, of the type that the graph states.

    Where it states none it is left to inference: the residual stream may be wider than the weights.
    """
    inner = {value.name: value for value in proto.graph.value_info}
    proto.graph.output.extend([inner.pop(name, None) or onnx.ValueInfoProto(name=name) for name in values])
    rest = [onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in inner.values()]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(rest)


def feeding(proto: onnx.ModelProto, value: str) -> onnx.ModelProto:
    """The part of the graph that computes ``value``, with it as the only output; unused inputs are left out."""
    part = onnx.ModelProto()
    part.CopyFrom(proto)
    needed, kept = {value}, []
    for node in reversed(proto.graph.node):
        if needed & set(node.output):
            needed |= set(node.input)
            kept.append(node)
    inputs = [entry for entry in proto.graph.input if entry.name in needed]
    constants = [entry for entry in proto.graph.initializer if entry.name in needed]
    del part.graph.node[:], part.graph.input[:], part.graph.output[:], part.graph.initializer[:]
    part.graph.node.extend(reversed(kept))
    part.graph.input.extend(inputs)
    part.graph.initializer.extend(constants)
    _show(part, [value])
    return part


def read_constant(folder: Path, tensor: onnx.TensorProto) -> NDArray[Any]:
    """The value of an initializer, from ``folder``'s weight files where it lies there.

    Raises UsageError when its bytes are not all there.
    """
    place = {entry.key: entry.value for entry in tensor.external_data}
    if not place:
        return onnx.numpy_helper.to_array(tensor)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    count = math.prod(tensor.dims)
    with (folder / place["location"]).open("rb") as file:
        file.seek(int(place.get("offset", "0")))
        content = file.read(count * dtype.itemsize)
    if len(content) != count * dtype.itemsize:
        raise UsageError(f"{folder / place['location']}: ends within weight {tensor.name!r}; export again.")
    return np.frombuffer(content, dtype).reshape(list(tensor.dims))


def layer_outputs(graph: ExportedGraph) -> list[str]:
    """Names of the residual stream after each block, in order.

    Raises UsageError when one is missing.
    """
    found = {}
    for node in graph.proto.graph.node:
        for name in node.output:
            match = _LAYER_OUTPUT.match(name)
            if match:
                found[int(match.group(1))] = name
    if sorted(found) != list(range(graph.layers)):
        raise UsageError(
            f"{graph.folder / MODEL_FILE}: has {graph.layers} layers of cache but values "
            f"/model/layers.*/output for {sorted(found)}; export again with this version."
        )
    return [found[index] for index in range(graph.layers)]


def _has_logits(proto: onnx.ModelProto) -> bool:
    return any(value.name == LOGITS for value in proto.graph.output)
