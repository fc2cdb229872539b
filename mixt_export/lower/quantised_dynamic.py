"""Products of int8 weights by int8 activations for ONNX Runtime: com.microsoft::DynamicQuantizeMatMul.

What a product reads is rounded to 255 steps from its least to its largest number, 0 always among them, one scale for
all of a call (docs/ContribOperators.md of ONNX Runtime, DynamicQuantizeLinear of the standard). Where a scale for each
token was asked for, every token is divided by its largest magnitude before, and its outputs multiplied by it behind.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mixt_export.lower.builder import MICROSOFT_DOMAIN, Dim
from mixt_export.lower.decoder import LoweredModel
from mixt_export.lower.precision import dims
from mixt_export.lower.quantised_matrix import QuantisedMatrix, Rounded, Use, initializer
from mixt_export.quantisation.blocks import packed_tensor

#: Of a token of zeros.
_TINY = 1e-30


def write_dynamic(
    lowered: LoweredModel, found: Mapping[str, tuple[QuantisedMatrix, list[Use]]], rounded: Rounded
) -> None:
    """Put integer products in place of what reads the matrices ``found``, each of one product with one scale a row."""
    for matrix, (use,) in found.values():
        codes = lowered.weights.packed(
            matrix.codes_name, (matrix.columns, matrix.rows), "int8", partial(_codes, rounded, matrix)
        )
        scales = lowered.weights.packed(
            matrix.scales_name, (matrix.rows,), "float32", partial(_scales, rounded, matrix)
        )
        values = initializer(lowered.model, codes), initializer(lowered.model, scales)
        _product(lowered.model, matrix.activations == "token", use.node, values)


def _codes(rounded: Rounded, matrix: QuantisedMatrix) -> NDArray[Any]:
    return packed_tensor(rounded.blocks(matrix), transposed=True)


def _scales(rounded: Rounded, matrix: QuantisedMatrix) -> NDArray[np.float32]:
    return rounded.blocks(matrix).scales[:, 0]


def _product(model: ir.Model, tokens: bool, node: ir.Node, values: tuple[ir.Value, ir.Value]) -> None:
    """The integer product in place of ``node``, under its name."""
    (old,), source, name = node.outputs, node.inputs[0], str(node.name)
    assert node.graph is not None and source is not None
    made: list[ir.Node] = []

    def op(op_type: str, inputs: list[ir.Value], shape: list[Dim], label: str = "", **attributes: Any) -> ir.Value:
        domain = MICROSOFT_DOMAIN if op_type == "DynamicQuantizeMatMul" else ""
        label = f"{name}/{label}" if label else name
        result = ir.Value(name=f"{label}/output_0", type=old.type, shape=ir.Shape(shape))
        made.append(ir.node(op_type, inputs, attributes=attributes, domain=domain, name=label, outputs=[result]))
        return result

    full, outputs = dims(source), dims(old)
    if tokens:
        one: list[Dim] = [*full[:-1], 1]
        last, tiny = _constant(model, np.array([-1]), "last_axis"), _constant(model, np.float32(_TINY), "tiny")
        largest = op("ReduceMax", [op("Abs", [source], full, "magnitude"), last], one, "largest", keepdims=1)
        scale = op("Max", [largest, tiny], one, "scale")
        source = op("Div", [source, scale], full, "normalised")
    new = op("DynamicQuantizeMatMul", [source, *values], outputs, "product" if tokens else "")
    if tokens:
        new = op("Mul", [new, scale], outputs)
    new.name = old.name
    ir.convenience.replace_nodes_and_values(node.graph, node, [node], made, [old], [new])


def _constant(model: ir.Model, array: Any, name: str) -> ir.Value:
    label = f"/constants/{name}"
    known = model.graph.initializers.get(label)
    return initializer(model, ir.tensor(array, name=label)) if known is None else known
