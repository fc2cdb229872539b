"""Run a decoder's graph block by block with ONNX Runtime, so that only one block's weights are in memory.

A graph is cut between the blocks that its nodes are named after. Matrices that are to be quantised are inputs of a
piece, so the same piece runs with float and with rounded matrices, and gives the second moments of what each reads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from mixt_export.errors import ResourceError
from mixt_export.optional import require
from mixt_export.quantisation.attended import ATTENTIONS, PRODUCTS, Observation, Part, observe_values

Values = dict[str, NDArray[Any]]
Read = Callable[[str], NDArray[Any]]

_BLOCK = re.compile(r"/layers?\.(\d+)/")
_QUIET = 4


@dataclass(frozen=True)
class Piece:
    """Consecutive nodes of a graph. ``reads``: values from before it; ``gives``: values that something after it reads.

    ``matrices``: the initializers of it that are fed as inputs; ``observed``: of those whose input's moments it can
    give, which output holds them, for all rows or for some.
    """

    model: onnx.ModelProto
    observing: onnx.ModelProto
    reads: tuple[str, ...]
    gives: tuple[str, ...]
    matrices: tuple[str, ...]
    observed: Mapping[str, Sequence[Part]]


def cut(model: onnx.ModelProto, matrices: Iterable[str], outputs: Sequence[str], read: Read) -> Iterator[Piece]:
    """The pieces of ``model`` in order: one for each block, and what comes before and after them.

    ``outputs``: those of the graph's outputs that are wanted. ``read(name)`` gives the value of an initializer in a
    file; a piece holds those that are not in ``matrices``.
    """
    wanted = set(matrices)
    groups = blocks_of(model.graph.node)
    needed_by = [set(_reads(nodes)) for nodes in groups]
    made: set[str] = {value.name for value in model.graph.input}
    for index, nodes in enumerate(groups):
        mine = {name for node in nodes for name in node.output}
        later = set().union(*needed_by[index + 1 :], outputs)
        gives = tuple(name for node in nodes for name in node.output if name in later)
        reads = tuple(name for name in dict.fromkeys(_reads(nodes)) if name in made and name not in mine)
        made |= mine
        yield _piece(model, nodes, reads, gives, wanted, read)


def blocks_of(nodes: Sequence[onnx.NodeProto]) -> list[list[onnx.NodeProto]]:
    """Nodes before the first block, of each block, and behind the last one; a node of no block goes with its place."""
    numbers = [int(found[1]) if (found := _BLOCK.search(node.name)) else None for node in nodes]
    last = max((index for index, number in enumerate(numbers) if number is not None), default=-1)
    groups: list[list[onnx.NodeProto]] = [[]]
    current: int | None = None
    for index, (node, number) in enumerate(zip(nodes, numbers, strict=True)):
        if index == last + 1 or (number is not None and number != current):
            groups.append([])
            current = number if number is not None else current
        groups[-1].append(node)
    return [group for group in groups if group]


def _reads(nodes: Iterable[onnx.NodeProto]) -> Iterator[str]:
    for node in nodes:
        yield from filter(None, node.input)
        for entry in node.attribute:
            if entry.type == onnx.AttributeProto.GRAPH:
                inner = {name for inside in entry.g.node for name in inside.output}
                yield from (name for name in _reads(entry.g.node) if name not in inner)


def _piece(
    model: onnx.ModelProto,
    nodes: Sequence[onnx.NodeProto],
    reads: tuple[str, ...],
    gives: tuple[str, ...],
    wanted: set[str],
    read: Read,
) -> Piece:
    used = set(_reads(nodes))
    types = {value.name: value for value in (*model.graph.input, *model.graph.value_info)}
    tensors = {tensor.name: tensor for tensor in model.graph.initializer if tensor.name in used}
    fed = tuple(name for name in tensors if name in wanted)
    inputs = [_untied(types[name]) for name in reads]
    inputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(tensors[name].dims)) for name in fed]
    held = [_held(tensor, read) for name, tensor in tensors.items() if name not in wanted]
    graph = helper.make_graph(
        list(nodes), "piece", inputs, [onnx.ValueInfoProto(name=name) for name in gives], initializer=held
    )
    piece = _inlined(helper.make_model(graph, functions=list(model.functions), opset_imports=list(model.opset_import)))
    piece.ir_version = model.ir_version
    observing, observed = _observing(piece, set(fed))
    return Piece(piece, observing, reads, gives, fed, observed)


def _untied(value: onnx.ValueInfoProto) -> onnx.ValueInfoProto:
    """The value's type without its shape: pieces are run with what comes."""
    return helper.make_tensor_value_info(value.name, value.type.tensor_type.elem_type, None)


def _held(tensor: onnx.TensorProto, read: Read) -> onnx.TensorProto:
    if tensor.data_location != TensorProto.EXTERNAL:
        return tensor
    return onnx.numpy_helper.from_array(np.ascontiguousarray(read(tensor.name)), tensor.name)


def _inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    import onnx.inliner

    versions = {entry.domain: entry.version for entry in model.opset_import}
    for function in model.functions:  # the inliner leaves functions of another opset alone
        for entry in function.opset_import:
            entry.version = versions.get(entry.domain, entry.version)
    return onnx.inliner.inline_local_functions(model) if model.functions else model


def _observing(piece: onnx.ModelProto, fed: set[str]) -> tuple[onnx.ModelProto, dict[str, list[Part]]]:
    """``piece`` with second moments of what its products read as further outputs; matrix -> those of its rows."""
    model = onnx.ModelProto()
    model.CopyFrom(piece)
    found = Observation()
    known: dict[str, str] = {}
    sizes = {
        value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim) for value in piece.graph.input
    }
    sizes = {name: size for name, size in sizes.items() if name in fed}
    sizes |= {tensor.name: tuple(tensor.dims) for tensor in piece.graph.initializer}
    for node in piece.graph.node:
        if node.op_type not in PRODUCTS or len(node.input) < 2 or node.input[1] not in fed:
            continue
        source, matrix = node.input[0], node.input[1]
        transposed = any(entry.name == "transB" and entry.i for entry in node.attribute)
        if source not in known:
            known[source] = found.moments(source, sizes[matrix][1 if transposed else 0], f"{source}/moments")
        found.parts.setdefault(matrix, [Part(known[source])])
    producers = {name: node for node in piece.graph.node for name in node.output}
    for node in piece.graph.node:
        if node.op_type in ATTENTIONS:
            observe_values(found, node, producers, sizes, frozenset(found.parts))
    model.graph.initializer.extend(found.constants)
    model.graph.node.extend(found.nodes)
    for name in {part.output: None for parts in found.parts.values() for part in parts}:
        size = [found.widths[name]] * 2
        model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, size))
    return model, found.parts


class Runner:
    """One piece in a session of its own; ``matrices`` are what it multiplies by."""

    def __init__(self, model: onnx.ModelProto, threads: int = 0) -> None:
        ort = require("onnxruntime", "rounding by calibration (choose --rounding nearest without it)")
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = _QUIET
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        except MemoryError as error:
            raise ResourceError("calibration: a block of the model does not fit into this machine's memory.") from error
        self._names = [value.name for value in self._session.get_outputs()]

    def run(self, values: Mapping[str, NDArray[Any]], matrices: Mapping[str, NDArray[Any]]) -> Values:
        """All outputs by name."""
        found = self._session.run(self._names, {**values, **matrices})
        return dict(zip(self._names, found, strict=True))


def inputs_of(model: onnx.ModelProto, window: NDArray[np.int64]) -> Values:
    """What ``model`` is given for one sequence (length,) from an empty cache."""
    found: dict[str, Any] = {}
    for value in model.graph.input:
        tensor = value.type.tensor_type
        if value.name == "input_ids":
            found[value.name] = window[None].astype(np.int64)
        elif value.name == "attention_mask":
            found[value.name] = np.ones((1, len(window)), np.int64)
        else:
            shape = [dim.dim_value for dim in tensor.shape.dim]
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
            found[value.name] = np.zeros((1, shape[1], 0, shape[3]), dtype)
    return found
