"""Count the constants of a graph and of the model folder it came from, from headers alone."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import onnx

_LAYER = re.compile(r"\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Weights:
    """``elements`` and ``nbytes`` of all constants; tensors that share bytes of a file count once."""

    elements: int
    nbytes: int
    rope_elements: int


def count_weights(proto: onnx.ModelProto) -> Weights:
    """Constants of the main graph and of its Constant nodes."""
    seen: dict[object, tuple[int, int, bool]] = {}
    for index, tensor in enumerate(constants(proto)):
        place = {entry.key: entry.value for entry in tensor.external_data}
        identity = (place.get("location"), place.get("offset", "0")) if place.get("location") else index
        size = math.prod(tensor.dims)
        rope = any(part in tensor.name.lower() for part in ("cos", "sin"))
        seen[identity] = (size, tensor_nbytes(tensor.data_type, tuple(tensor.dims)), rope)
    return Weights(
        sum(size for size, _, _ in seen.values()),
        sum(nbytes for _, nbytes, _ in seen.values()),
        sum(size for size, _, rope in seen.values() if rope),
    )


def constants(proto: onnx.ModelProto) -> Iterable[onnx.TensorProto]:
    """Initializers, and the values of Constant nodes."""
    yield from proto.graph.initializer
    for node in proto.graph.node:
        if node.op_type == "Constant":
            yield from (attribute.t for attribute in node.attribute if attribute.name == "value")


def tensor_nbytes(element: int, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of ONNX element type ``element``."""
    return math.prod(shape) * onnx.helper.tensor_dtype_to_np_dtype(element).itemsize


@dataclass(frozen=True)
class CheckpointSize:
    """Parameters of a model folder as stored, and as they would be with every factorised linear dense."""

    elements: int
    dense_elements: int


def checkpoint_size(folder: Path, layers: int) -> CheckpointSize:
    """Count from the headers of ``folder``; blocks from number ``layers`` on are left out."""
    from mixt_export.checkpoints import open_checkpoint

    checkpoint = open_checkpoint(folder)
    sizes = {name: math.prod(stored.ref.shape) for name, stored in checkpoint.store.items() if _kept(name, layers)}
    stored = sum(sizes.values())
    cores: set[str] = set()
    dense = 0
    for name, linear in checkpoint.factors.items():
        if not _kept(f"{name}.", layers):
            continue
        bias = set() if linear.bias is None else {linear.bias.name}
        cores |= {ref.name for ref in linear.tensors()} - bias
        dense += linear.in_features * linear.out_features
    return CheckpointSize(stored, stored - sum(sizes.get(name, 0) for name in cores) + dense)


def mergeable_elements(folder: Path, layers: int) -> int:
    """Constants that an export can add at most by merging terms of MixT linears: all of them dense.

    Counted from the headers of ``folder``; blocks from number ``layers`` on are left out.
    """
    from mixt_export.checkpoints import open_checkpoint
    from mixt_export.plan import Mixture

    linears = [linear for name, linear in open_checkpoint(folder).factors.items() if _kept(f"{name}.", layers)]
    found = [mixture for mixture in map(Mixture.of, linears) if mixture is not None]
    cores = {term.tensor: math.prod(mixture.core_shape) for mixture in found for term in mixture.terms}
    dense = sum(mixture.in_features * mixture.out_features for mixture in found)
    return max(dense - sum(cores.values()), 0)


def _kept(name: str, layers: int) -> bool:
    match = _LAYER.search(name)
    return match is None or int(match.group(1)) < layers
