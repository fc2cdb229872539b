"""Count the constants of a graph and of the model folder it came from, from headers alone."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx

_LAYER = re.compile(r"\.(?:layers|h)\.(\d+)\.")

#: Two values in a byte; numpy's types of them take one each.
_HALF_BYTES = frozenset({onnx.TensorProto.INT4, onnx.TensorProto.UINT4})


@dataclass(frozen=True)
class Weights:
    """``elements`` and ``nbytes`` of all constants; tensors that share bytes of a file count once."""

    elements: int
    nbytes: int
    rope_elements: int


def count_weights(proto: onnx.ModelProto, *, apart: bool = False) -> Weights:
    """Constants of the main graph and of its Constant nodes.

    Those that share a place in a file count once; ``apart``: each by itself, as in a copy that ONNX Runtime writes.
    """
    seen: dict[object, tuple[int, int, bool]] = {}
    for index, tensor in enumerate(constants(proto)):
        place = {entry.key: entry.value for entry in tensor.external_data}
        shares = bool(place.get("location")) and not apart
        identity = (place.get("location"), place.get("offset", "0")) if shares else index
        size = math.prod(tensor.dims)
        rope = any(part in tensor.name.lower() for part in ("cos", "sin"))
        seen[identity] = (size, tensor_nbytes(tensor.data_type, tuple(tensor.dims)), rope)
    return Weights(
        sum(size for size, _, _ in seen.values()),
        sum(nbytes for _, nbytes, _ in seen.values()),
        sum(size for size, _, rope in seen.values() if rope),
    )


def constants(proto: onnx.ModelProto) -> Iterable[onnx.TensorProto]:
    """Initializers and the values of Constant nodes, those inside of branches and loops included."""
    yield from _inner(proto.graph)


def _inner(graph: onnx.GraphProto) -> Iterable[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        if node.op_type == "Constant":
            yield from (attribute.t for attribute in node.attribute if attribute.name == "value")
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _inner(attribute.g)


def tensor_nbytes(element: int, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of ONNX element type ``element``."""
    if element in _HALF_BYTES:
        return -(-math.prod(shape) // 2)
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


def merged_elements(
    folder: Path,
    layers: int,
    forms: Mapping[str, str],
    reads: Mapping[str, str] | None = None,
    cores: Mapping[str, str] | None = None,
    many: Mapping[str, str] | None = None,
) -> int:
    """Constants that an export adds to those stored by executing linears in ``forms`` (name of the linear -> form).

    ``cores``: steps that several linears share -> the tensor each reads; ``reads``: what reads their outputs; ``many``:
    linears -> the second form that runs of many tokens take.
    Counted anew from the headers of ``folder``: a form that a linear does not have adds nothing. Blocks from number
    ``layers`` on are left out.
    """
    from mixt_export.checkpoints import open_checkpoint
    from mixt_export.plan import Choice, named_forms, planned_elements, stored_elements
    from mixt_export.plan.sharing import shared_again

    kept = {name: linear for name, linear in open_checkpoint(folder).factors.items() if _kept(f"{name}.", layers)}
    choices = []
    for name, linear in shared_again(kept, reads or {}, cores or {}).items():
        every = named_forms(linear)
        form = next((form for form in every if form.name == forms.get(name)), every[0])
        choices.append(Choice(linear, form))
        choices += [Choice(linear, form) for form in every if many and form.name == many.get(name)]
    return planned_elements(choices) - stored_elements(choices)


def _kept(name: str, layers: int) -> bool:
    match = _LAYER.search(name)
    return match is None or int(match.group(1)) < layers
