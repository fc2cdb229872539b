"""A cache of 8 bits: the same graph with a float cache, and PyTorch that keeps keys and values as the graph does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from mixt_export.errors import UsageError
from mixt_export.verification.graph import ExportedGraph, read_constant
from mixt_export.verification.torch_model import TorchModel

_OPERATOR = "GroupQueryAttention"
#: Inputs of the operator: the past keys, and the first of two with scales.
_PAST, _SCALES = 3, 12
_ATTRIBUTES = ("kv_cache_bit_width", "k_quant_type", "v_quant_type")
PARTS = ("key", "value")


def float_cache(graph: ExportedGraph) -> ExportedGraph:
    """``graph`` with keys and values cached as they are computed; itself where it does so."""
    if not graph.int8_cache:
        return graph
    proto = onnx.ModelProto()
    proto.CopyFrom(graph.proto)
    for node in _attentions(proto):
        del node.input[_SCALES:]
        while node.input and not node.input[-1]:
            node.input.pop()
        kept = [entry for entry in node.attribute if entry.name not in _ATTRIBUTES]
        del node.attribute[:]
        node.attribute.extend(kept)
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        if value.type.tensor_type.elem_type == onnx.TensorProto.INT8:
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    return replace(graph, proto=proto, int8_cache=False)


def cache_scales(graph: ExportedGraph) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Scales (1, kv_heads, 1, head_dim) of keys and values of every block, as they are computed.

    Of values that the graph keeps divided by factors, their product. Raises UsageError where there are none.
    """
    tensors = {tensor.name: tensor for tensor in graph.proto.graph.initializer}
    found: dict[str, Any] = {}
    for node in _attentions(graph.proto):
        if len(node.input) < _SCALES + 2 or not set(node.input[_SCALES:]) <= tensors.keys():
            raise UsageError(f"{graph.folder}: {node.name} has an int8 cache and no constant scales; export again.")
        found[node.input[_PAST]] = tuple(read_constant(graph.folder, tensors[name]) for name in node.input[_SCALES:])
    try:
        scales = [found[f"past_key_values.{layer}.key"] for layer in range(graph.layers)]
    except KeyError as error:
        raise UsageError(f"{graph.folder}: no attention reads {error}; export again.") from error
    size = (1, graph.kv_heads, 1, graph.head_dim)
    if any(part.size != np.prod(size) for pair in scales for part in pair):
        raise UsageError(f"{graph.folder}: has scales of the cache that are not of shape {size}; export again.")
    return [
        (key.reshape(size), value.reshape(size) * graph.smoothing.get(f"past_key_values.{layer}.value", np.float32(1)))
        for layer, (key, value) in enumerate(scales)
    ]


def _attentions(proto: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in proto.graph.node if node.op_type == _OPERATOR]


@dataclass
class Fit:
    """How keys and values of a model lie in the range of their scales, by block and part."""

    clipped: dict[tuple[int, str], float] = field(default_factory=dict)
    """Share of the numbers beyond the range."""
    error: dict[tuple[int, str], float] = field(default_factory=dict)
    """Relative L2 of what is kept."""


@contextmanager
def rounding_cache(
    model: TorchModel, scales: list[tuple[NDArray[np.float32], NDArray[np.float32]]], fit: Fit | None = None
) -> Iterator[None]:
    """While open, ``model`` attends to keys and values rounded as they are kept, those of the present run included.

    The kernel of ONNX Runtime's CPU reads what it has just written: codes of -128 … 127, half to even.
    """
    import torch

    pairs = [tuple(torch.from_numpy(np.array(part)) for part in pair) for pair in scales]

    def kept(layer: int, part: str, values: Any) -> Any:
        scale = pairs[layer][PARTS.index(part)].to(values.dtype)
        codes = (values / scale).round()
        rounded = codes.clamp(-128, 127) * scale
        if fit is not None:
            fit.clipped[layer, part] = float(((codes < -128) | (codes > 127)).float().mean())
            fit.error[layer, part] = float((rounded - values).norm() / values.norm().clamp(min=1e-30))
        return rounded

    with model.keeping(lambda layer, keys, values: (kept(layer, "key", keys), kept(layer, "value", values))):
        yield
