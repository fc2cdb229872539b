"""Weights of few bits in standard ONNX: integers and scales behind DequantizeLinear, products as they were.

The float matrix exists between two nodes only. A runtime that has a kernel for the pair fuses them, as ONNX Runtime
does; another computes the matrix. A table of rows is looked up as integers, so that no runtime need widen it whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mixt_export.checkpoints.dtypes import numpy_dtype
from mixt_export.lower.decoder import LoweredModel
from mixt_export.lower.precision import dims
from mixt_export.lower.quantised_matrix import QuantisedMatrix, Rounded, Use, initializer
from mixt_export.quantisation.blocks import count, packed_tensor

_KINDS = {4: ("int4", ir.DataType.INT4), 8: ("int8", ir.DataType.INT8)}


def write_dequantised(
    lowered: LoweredModel, found: Mapping[str, tuple[QuantisedMatrix, list[Use]]], rounded: Rounded
) -> None:
    """Put DequantizeLinear in front of what reads the matrices ``found``: with blocks (opset 21), or a scale a row."""
    for matrix, uses in found.values():
        codes, scales = _initializers(lowered, matrix, rounded)
        products = [use for use in uses if use.node.op_type != "Gather"]
        for use in uses:
            if use.node.op_type == "Gather":
                _lookup(matrix, use.node, codes, scales)
        if products:
            _dequantise(lowered, matrix, codes, scales, products)


def _initializers(lowered: LoweredModel, matrix: QuantisedMatrix, rounded: Rounded) -> tuple[ir.Value, ir.Value]:
    """Codes in the layout of the matrix they stand for, and scales with its axis of inputs in blocks, or without it."""
    blocks, flip = count(matrix.columns, matrix.group), matrix.transposed
    sizes = (matrix.rows, matrix.columns), (matrix.rows, blocks)
    shape, blocked = (size[::-1] if flip else size for size in sizes)
    scale_shape = (matrix.rows,) if matrix.by_row else blocked
    kind, _ = _KINDS[matrix.bits]
    weights = lowered.weights

    def values() -> NDArray[Any]:
        found = rounded.blocks(matrix).scales
        found = np.ascontiguousarray(found.T) if flip else found
        return found.astype(numpy_dtype(weights.dtype))

    codes = weights.packed(
        matrix.codes_name, shape, kind, lambda: packed_tensor(rounded.blocks(matrix), transposed=flip)
    )
    scales = weights.packed(matrix.scales_name, scale_shape, weights.dtype, values)
    return initializer(lowered.model, codes), initializer(lowered.model, scales)


def _dequantise(
    lowered: LoweredModel, matrix: QuantisedMatrix, codes: ir.Value, scales: ir.Value, uses: list[Use]
) -> None:
    value = lowered.model.graph.initializers[matrix.name]
    result = ir.Value(name=f"{matrix.name}/float", type=value.type, shape=value.shape)
    node = ir.node(
        "DequantizeLinear",
        [codes, scales],
        attributes=_granularity(matrix),
        name=f"{matrix.name}/DequantizeLinear",
        outputs=[result],
    )
    lowered.model.graph.insert_before(lowered.model.graph.node(0), node)
    readers = {use.node for use in uses}
    for reader, index in list(value.uses()):
        if reader in readers:
            reader.replace_input_with(index, result)


def _granularity(matrix: QuantisedMatrix) -> dict[str, int]:
    """The axis along which blocks lie, or that of the outputs where each has a scale of its own."""
    inputs = 0 if matrix.transposed else 1
    return {"axis": 1 - inputs} if matrix.by_row else {"axis": inputs, "block_size": matrix.group}


def _lookup(matrix: QuantisedMatrix, gather: ir.Node, codes: ir.Value, scales: ir.Value) -> None:
    """Rows of codes and of scales are picked, and only those become floats."""
    (row,) = gather.outputs
    graph, index, name = gather.graph, gather.inputs[1], gather.name
    assert graph is not None and index is not None
    lead = dims(row)[:-1]
    picked = []
    for value, what in ((codes, "codes"), (scales, "scales")):
        assert value.shape is not None
        shape = ir.Shape([*lead, value.shape[1]])
        found = ir.Value(name=f"{name}/{what}_output", type=value.type, shape=shape)
        graph.insert_before(
            gather, ir.node("Gather", [value, index], name=f"{name}/{what}", outputs=[found], attributes={"axis": 0})
        )
        picked.append(found)
    new = ir.Value(name=row.name, type=row.type, shape=row.shape)
    node = ir.node(
        "DequantizeLinear", picked, attributes={"axis": len(lead), "block_size": matrix.group}, name=name, outputs=[new]
    )
    ir.convenience.replace_nodes_and_values(graph, gather, [gather], [node], [row], [new])
