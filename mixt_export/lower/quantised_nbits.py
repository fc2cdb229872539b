"""Weights of few bits for ONNX Runtime: MatMulNBits for products, GatherBlockQuantized for the lookup of rows.

A call of a model-local function with matrices that became blocks turns into the call of a function that takes them so;
it is made from the normative text, one for each set of operands, bits and group. Source: docs/ContribOperators.md of
ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import prod
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from mixt_export.lower.builder import MICROSOFT_DOMAIN, MIXT_DOMAIN
from mixt_export.lower.decoder import LoweredModel
from mixt_export.lower.quantised_matrix import QuantisedMatrix, Rounded, Use, initializer, replace_node
from mixt_export.quantisation.blocks import count, packed_nbits


def write_nbits(
    lowered: LoweredModel, found: Mapping[str, tuple[QuantisedMatrix, list[Use]]], rounded: Rounded
) -> None:
    """Put com.microsoft's products and lookups of blocks in place of what reads the matrices ``found``."""
    model, weights = lowered.model, lowered.weights
    model.graph.opset_imports.setdefault(MICROSOFT_DOMAIN, 1)
    operands: dict[ir.Node, dict[str, tuple[QuantisedMatrix, ir.Value, ir.Value]]] = {}
    for matrix, uses in found.values():
        blocks, blob = count(matrix.columns, matrix.group), matrix.group * matrix.bits // 8
        codes = weights.packed(
            matrix.codes_name,
            (matrix.rows, blocks, blob),
            "uint8",
            partial(_codes, rounded, matrix),
        )
        scales = weights.packed(matrix.scales_name, (matrix.rows, blocks), "float32", partial(_scales, rounded, matrix))
        values = initializer(model, codes), initializer(model, scales)
        for use in uses:
            if use.operand is not None:
                operands.setdefault(use.node, {})[use.operand] = (matrix, *values)
            elif use.node.op_type == "Gather":
                _lookup(lowered, matrix, use.node, codes, values[1])
            else:
                _product(matrix, use.node, *values)
    for node, replaced in operands.items():
        _call(model, node, replaced)


def _codes(rounded: Rounded, matrix: QuantisedMatrix) -> NDArray[np.uint8]:
    return packed_nbits(rounded.blocks(matrix))


def _scales(rounded: Rounded, matrix: QuantisedMatrix) -> NDArray[np.float32]:
    return rounded.blocks(matrix).scales


def _attributes(matrix: QuantisedMatrix) -> dict[str, int]:
    """``accuracy_level`` 4: activations are rounded to int8 in the same blocks, the only fast kernel on CPUs."""
    return {"bits": matrix.bits, "block_size": matrix.group, "accuracy_level": 4}


def _product(matrix: QuantisedMatrix, node: ir.Node, codes: ir.Value, scales: ir.Value) -> None:
    attributes = {"K": matrix.columns, "N": matrix.rows, **_attributes(matrix)}
    replace_node(node, "MatMulNBits", [node.inputs[0], codes, scales], attributes, MICROSOFT_DOMAIN)


def _lookup(
    lowered: LoweredModel, matrix: QuantisedMatrix, node: ir.Node, codes: ir.TensorProtocol, scales: ir.Value
) -> None:
    """The lookup reads the bytes of the product's table as rows: the same place in the file under another shape."""
    assert isinstance(codes, ir.ExternalTensor)
    shape = ir.Shape([matrix.rows, prod(codes.shape.numpy()) // matrix.rows])
    rows = ir.ExternalTensor(
        codes.location, codes.offset, codes.length, codes.dtype, shape=shape, name=f"{matrix.codes_name}.rows"
    )
    attributes = {"bits": matrix.bits, "block_size": matrix.group, "gather_axis": 0, "quantize_axis": 1}
    inputs = [initializer(lowered.model, rows), node.inputs[1], scales]
    replace_node(node, "GatherBlockQuantized", inputs, attributes, MICROSOFT_DOMAIN)


def _call(model: ir.Model, node: ir.Node, replaced: Mapping[str, tuple[QuantisedMatrix, ir.Value, ir.Value]]) -> None:
    """A call of a function with some of its matrices quantised: the call of a function that takes them so."""
    function = model.functions[node.op_identifier()]
    suffix = "_".join(f"{name}{matrix.bits}g{matrix.group}" for name, (matrix, _, _) in replaced.items())
    name = f"{function.name}_{suffix}"
    identifier = (function.domain, name, "")
    if identifier not in model.functions:
        model.functions[identifier] = _quantised_function(
            function, name, {operand: matrix for operand, (matrix, _, _) in replaced.items()}
        )
    inputs: list[ir.Value | None] = []
    attributes: dict[str, Any] = dict(node.attributes)
    for formal, actual in zip(function.inputs, node.inputs, strict=True):
        entry = replaced.get(str(formal.name))
        if entry is None:
            inputs.append(actual)
            continue
        matrix, codes, scales = entry
        inputs += [codes, scales]
        attributes |= {f"K_{formal.name}": matrix.columns, f"N_{formal.name}": matrix.rows}
    replace_node(node, name, inputs, attributes, MIXT_DOMAIN)


def _quantised_function(function: ir.Function, name: str, replaced: Mapping[str, QuantisedMatrix]) -> ir.Function:
    """``function`` with MatMulNBits in place of MatMul for the operands ``replaced``; sizes reach it as attributes."""
    proto = ir.serde.serialize_function(function)
    proto.name = name
    inputs = [part for old in proto.input for part in ([old, f"{old}_scales"] if old in replaced else [old])]
    proto.input[:] = inputs
    proto.attribute.extend(f"{size}_{operand}" for operand in replaced for size in "KN")
    if not any(entry.domain == MICROSOFT_DOMAIN for entry in proto.opset_import):
        proto.opset_import.append(onnx.helper.make_opsetid(MICROSOFT_DOMAIN, 1))
    for node in proto.node:
        operand = node.input[1] if node.op_type == "MatMul" else ""
        if operand not in replaced:
            continue
        node.op_type, node.domain = "MatMulNBits", MICROSOFT_DOMAIN
        node.input.append(f"{operand}_scales")
        for key, number in _attributes(replaced[operand]).items():
            node.attribute.append(onnx.helper.make_attribute(key, number))
        for size in "KN":
            node.attribute.append(
                onnx.AttributeProto(name=size, ref_attr_name=f"{size}_{operand}", type=onnx.AttributeProto.INT)
            )
    return ir.serde.deserialize_function(proto)
