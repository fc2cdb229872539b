"""What a quantised export is proven against: PyTorch with the weights that its integers stand for.

Two things are kept apart. That the graph computes what PyTorch computes with the same integers is judged as any float32
export is, at the same bar, with products told to leave activations in float32. What rounding activations to int8
costs on top, as the graph runs when it is used, is a check of its own (checks.int8_activations), and how far the
integers are from the weights they stand for another (checks.quantised_weights).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from mixt_export.checkpoints import Checkpoint, open_checkpoint
from mixt_export.checkpoints.overlay import Made, overlaid
from mixt_export.checkpoints.store import TensorStore
from mixt_export.checkpoints.strictjson import load_optional
from mixt_export.errors import UsageError
from mixt_export.network import Core, FactorizedLinear
from mixt_export.quantisation.blocks import Blocks, dequantised, unpacked_nbits, unpacked_tensor
from mixt_export.verification.graph import SMOOTHING_FILE, ExportedGraph, open_graph, read_constant

_PRODUCT = "MatMulNBits"
INTEGER = "DynamicQuantizeMatMul"
#: Products that round what they read.
ROUNDING = frozenset({_PRODUCT, INTEGER})
_DENSE = ".dense"


@dataclass(frozen=True)
class Matrix:
    """One quantised matrix as the manifest describes it, and where its integers lie. See docs/format.md.

    The integers stand for the weights with columns multiplied by ``inputs`` and rows divided by ``outputs``; something
    else in the graph has to make up for that, of which nothing is assumed here.
    """

    name: str
    rows: int
    columns: int
    transposed: bool
    bits: int
    group: int
    parts: tuple[str, ...]
    flipped: bool
    error: float
    steps: float
    folder: Path
    codes: onnx.TensorProto
    scales: onnx.TensorProto
    activations: str = ""
    inputs: NDArray[np.float32] | None = None
    outputs: NDArray[np.float32] | None = None

    @property
    def linear(self) -> str:
        """The linear or table it belongs to."""
        stem = self.parts[0] if self.parts else self.name
        return stem.removesuffix(".weight").removesuffix(_DENSE)

    def blocks(self) -> Blocks:
        """Codes and scales as they lie in the folder."""
        codes, scales = _bytes(self.folder, self.codes), read_constant(self.folder, self.scales)
        if self.codes.data_type == onnx.TensorProto.UINT8:
            shape = self.rows, self.codes.dims[1], self.codes.dims[2]
            return unpacked_nbits(codes.reshape(shape), scales, self.columns, self.bits, self.group)
        size, turned = (self.rows, self.columns), self.transposed or bool(self.activations)
        return unpacked_tensor(codes, scales, size, self.bits, self.group, transposed=turned)

    def stacked(self) -> NDArray[np.float32]:
        """The float values that the integers stand for, in the order of the stored parts one after the other.

        (rows, columns) for the dense matrix of a factorised linear, which has no parts.
        """
        values = self._scaled(dequantised(self.blocks()), back=True)
        return np.ascontiguousarray(values.T) if self.flipped and self.parts else values

    def source(self, checkpoint: Checkpoint) -> NDArray[np.float32]:
        """The (rows, columns) weights of ``checkpoint`` as the integers stand for them."""
        if not self.parts:
            from mixt_export.network import densify

            load = partial(checkpoint.store.read, dtype="float32")
            return self._scaled(densify(checkpoint.factors[self.linear], load).astype(np.float32))
        flat = np.concatenate([checkpoint.store.read(part, "float32").reshape(-1) for part in self.parts])
        shape = (self.columns, self.rows) if self.flipped else (self.rows, self.columns)
        values: NDArray[np.float32] = flat.reshape(shape)
        return self._scaled(values.T if self.flipped else values)

    def _scaled(self, values: NDArray[np.float32], *, back: bool = False) -> NDArray[np.float32]:
        """(rows, columns) weights as the integers stand for them, or ``back`` from there."""
        if self.inputs is None and self.outputs is None:
            return values
        wide = values.astype(np.float64)
        for factors, divided in ((self.inputs, back), (self._outputs, not back)):
            if factors is not None:
                wide = wide / factors if divided else wide * factors
        return wide.astype(np.float32)

    @property
    def _outputs(self) -> NDArray[np.float32] | None:
        return None if self.outputs is None else self.outputs[:, None]


def _bytes(folder: Path, tensor: onnx.TensorProto) -> NDArray[np.uint8]:
    """The bytes of an external tensor, of INT4 two values each."""
    place = {entry.key: entry.value for entry in tensor.external_data}
    with (folder / place["location"]).open("rb") as file:
        file.seek(int(place.get("offset", "0")))
        return np.frombuffer(file.read(int(place["length"])), np.uint8)


def matrices_of(graph: ExportedGraph, manifest: Mapping[str, Any]) -> dict[str, Matrix]:
    """The quantised matrices of an exported folder by name; empty for one with float weights.

    Raises UsageError when manifest and graph do not agree about them.
    """
    entry = manifest.get("quantisation")
    listed = entry.get("matrices") if isinstance(entry, dict) else None
    if not isinstance(listed, dict):
        if any(node.op_type in ROUNDING for node in _nodes(graph.proto)):
            raise UsageError(f"{graph.folder}: has quantised weights that its manifest does not list; export again.")
        return {}
    tensors = {tensor.name: tensor for tensor in graph.proto.graph.initializer}
    sides = graph.smoothing
    found = {}
    for name, each in listed.items():
        try:
            rows, columns = each["shape"]
            found[name] = Matrix(
                name, int(rows), int(columns), bool(each["transposed"]), int(each["bits"]), int(each["group"]),
                tuple(each["parts"]), bool(each["flipped"]), float(each["error"]), float(each["steps"]),
                graph.folder, tensors[each["codes"]], tensors[each["scales"]],
                str(each.get("activations", "")), sides.get(f"{name}.inputs"), sides.get(f"{name}.outputs"),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(
                f"{graph.folder}: the manifest's entry of the quantised matrix {name!r} does not fit the graph "
                f"({error}); export again."
            ) from error
        for factors, size in ((found[name].inputs, columns), (found[name].outputs, rows)):
            if factors is not None and factors.shape != (size,):
                raise UsageError(
                    f"{graph.folder}: its {SMOOTHING_FILE} has factors of shape {factors.shape} for {name!r}, which "
                    f"has {rows} outputs and {columns} inputs; export again."
                )
    return found


def ends_of(node: onnx.NodeProto, matrix: Matrix, nodes: Iterable[onnx.NodeProto]) -> tuple[str, str]:
    """What the product ``node`` by ``matrix`` reads and gives, with what divides and multiplies tokens around it."""
    source, result = node.input[0], node.output[0]
    if matrix.activations == "token":
        source = next((each.input[0] for each in nodes if source in each.output), source)
        result = next((each.output[0] for each in nodes if result in each.input), result)
    return source, result


def smoothed_values(graph: ExportedGraph, matrices: Mapping[str, Matrix]) -> dict[str, NDArray[np.float32]]:
    """Values of the graph that are those of PyTorch divided by factors (features,), by their names."""
    by_codes = {matrix.codes.name: matrix for matrix in matrices.values()}
    nodes = graph.proto.graph.node
    found: dict[str, NDArray[np.float32]] = {}
    for node in nodes:
        matrix = by_codes.get(node.input[1]) if node.op_type in ROUNDING else None
        if matrix is None:
            continue
        source, result = ends_of(node, matrix, nodes)
        if matrix.inputs is not None:
            found[source] = matrix.inputs
        if matrix.outputs is not None:
            found[result] = matrix.outputs
            biased = (each.output[0] for each in nodes if each.op_type == "Add" and result in each.input)
            found |= dict.fromkeys(biased, matrix.outputs)
    return found


def float_activations(graph: ExportedGraph) -> ExportedGraph:
    """``graph`` with every product computing in float32 instead of rounding what it reads to int8.

    At 4 bits the operator has a way to do so. At 8 bits that way is sixteen times slower than float weights (ONNX
    Runtime 1.31), so the product becomes what the operator's specification says, of the same bytes, in standard
    operators that the runtime works out once while it loads.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(graph.proto)
    for owner in (proto.graph, *proto.functions):
        nodes: list[onnx.NodeProto] = []
        for node in owner.node:
            if node.op_type == INTEGER:
                nodes += _with_floats(node)
            else:
                wide = node.op_type == _PRODUCT and _number(node, "bits") == 8
                nodes += _spelled_out(node) if wide else [node]
        del owner.node[:]
        owner.node.extend(nodes)
    for node in _nodes(proto):
        if node.op_type == _PRODUCT:
            for entry in node.attribute:
                entry.i = 1 if entry.name == "accuracy_level" else entry.i
    return replace(graph, proto=proto)


def _number(node: onnx.NodeProto, name: str) -> int:
    return next((int(entry.i) for entry in node.attribute if entry.name == name), 0)


def _with_floats(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """y = x · (scale · code) with int8 codes (K, N) and scales (N,) of DynamicQuantizeMatMul."""
    source, codes, scales = node.input
    made = onnx.helper.make_node
    within = f"{node.output[0]}/dequantised/".__add__
    return [
        made("Cast", [codes], [within("codes")], to=onnx.TensorProto.FLOAT),
        made("Mul", [within("codes"), scales], [within("matrix")]),
        made("MatMul", [source, within("matrix")], [node.output[0]], name=node.name),
    ]


def _spelled_out(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """y = x · (scale · (code - 128))ᵀ with codes (N, blocks, group) uint8 and scales (N, blocks) of MatMulNBits."""
    source, codes, scales = node.input[:3]
    made = onnx.helper.make_node
    # Named after the output, which is unique: several products may share a matrix.
    within = f"{node.output[0]}/dequantised/".__add__

    def constant(name: str, **value: Any) -> onnx.NodeProto:
        return made("Constant", [], [within(name)], **value)

    columns = made("Constant", [], [within("columns")])
    size = columns.attribute.add()
    size.CopyFrom(next(entry for entry in node.attribute if entry.name == "K"))  # a number, or the caller's attribute
    size.name = "value_int"
    return [
        constant("zero", value_float=128.0),
        constant("first", value_ints=[0]),
        constant("one", value_ints=[1]),
        constant("last", value_ints=[-1]),
        constant("flat", value_ints=[0, -1]),
        columns,
        made("Reshape", [within("columns"), within("one")], [within("end")]),
        made("Cast", [codes], [within("codes")], to=onnx.TensorProto.FLOAT),
        made("Sub", [within("codes"), within("zero")], [within("steps")]),
        made("Unsqueeze", [scales, within("last")], [within("scales")]),
        made("Mul", [within("steps"), within("scales")], [within("blocks")]),
        made("Reshape", [within("blocks"), within("flat")], [within("padded")]),
        made("Slice", [within("padded"), within("first"), within("end"), within("one")], [within("rows")]),
        made("Transpose", [within("rows")], [within("matrix")], perm=[1, 0]),
        made("MatMul", [source, within("matrix")], [node.output[0]], name=node.name),
    ]


def _nodes(proto: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Nodes of the graph, of branches in it and of its functions."""
    waiting = [*proto.graph.node, *(node for function in proto.functions for node in function.node)]
    while waiting:
        node = waiting.pop()
        waiting += [inner for entry in node.attribute for inner in entry.g.node]
        yield node


def with_integers(checkpoint: Checkpoint, matrices: Mapping[str, Matrix]) -> Checkpoint:
    """``checkpoint`` with the weights that ``matrices`` stand for in place of its own.

    Raises UsageError for a matrix of tensors that the checkpoint does not have.
    """
    made: dict[str, Made] = {}
    dense = {matrix.linear: matrix for matrix in matrices.values() if not matrix.parts}
    for matrix in matrices.values():
        begin = 0
        for part in matrix.parts:
            if part not in checkpoint.store:
                raise UsageError(
                    f"{checkpoint.path}: has no tensor {part!r}, which the integers {matrix.name!r} stand for; "
                    "give the model folder that was exported with --reference."
                )
            shape = checkpoint.store[part].ref.shape
            count = int(np.prod(shape))
            made[part] = Made("float32", shape, partial(_cut, matrix, begin, shape))
            begin += count
    for name, matrix in dense.items():
        made[f"{name}.weight"] = Made("float32", (matrix.rows, matrix.columns), matrix.stacked)
    return overlaid(_without(checkpoint, dense.keys()), made, _at_float32(checkpoint, dense.keys(), made))


def integers_of(folder: Path, source: Path) -> Checkpoint:
    """The model folder ``source`` with the weights that the integers of the export in ``folder`` stand for.

    Raises UsageError as `matrices_of` and `with_integers`.
    """
    matrices = matrices_of(open_graph(folder), load_optional(folder / "mixt_manifest.json"))
    return with_integers(open_checkpoint(source), matrices)


def _without(checkpoint: Checkpoint, names: Set[str]) -> Checkpoint:
    """``checkpoint`` without the factors of the linears ``names``, and without their cores."""
    kept = {name: linear for name, linear in checkpoint.factors.items() if name not in names}
    used = {core.name for linear in kept.values() for core in linear.tensors()}
    dropped = {
        core.name
        for name in names
        for core in checkpoint.factors[name].tensors()
        if core != checkpoint.factors[name].bias
    }
    store = {name: stored for name, stored in checkpoint.store.items() if name in used or name not in dropped}
    return replace(checkpoint, factors=kept, store=TensorStore(store))


def _at_float32(checkpoint: Checkpoint, dense: Set[str], made: Mapping[str, Made]) -> dict[str, FactorizedLinear]:
    return {name: _as_float32(linear, made) for name, linear in checkpoint.factors.items() if name not in dense}


def _cut(matrix: Matrix, begin: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    flat = matrix.stacked().reshape(-1)
    part: NDArray[np.float32] = flat[begin : begin + int(np.prod(shape))].reshape(shape)
    return part


def _as_float32(linear: FactorizedLinear, made: Mapping[str, Made]) -> FactorizedLinear:
    """``linear`` with its replaced cores of the dtype that their integers stand for."""

    def core(each: Core) -> Core:
        return replace(each, tensor=replace(each.tensor, dtype="float32")) if each.tensor.name in made else each

    branches = tuple(replace(branch, cores=tuple(map(core, branch.cores))) for branch in linear.branches)
    return replace(linear, branches=branches)
