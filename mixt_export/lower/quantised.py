"""Quantise a lowered graph: the matrices of its products become blocks of integers, in the dialect's own way.

This happens to the finished graph, after forms were chosen, so every product of a weight that is written as a MatMul is
found the same way: dense linears, both factors of a low rank, windows and merged matrices, the head. What the planner
decided stays decided; its costs are those of floats.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import onnx_ir as ir

from mixt_export.lower.builder import MICROSOFT_DOMAIN, MIXT_DOMAIN
from mixt_export.lower.decoder import LoweredModel
from mixt_export.lower.dialects import Dialect, check_dialect
from mixt_export.lower.quantised_dynamic import write_dynamic
from mixt_export.lower.quantised_matrix import QuantisedMatrix, Reader, Rounded, Use
from mixt_export.lower.quantised_nbits import write_nbits
from mixt_export.lower.quantised_standard import write_dequantised
from mixt_export.lower.weights import DTYPES, Weights
from mixt_export.quantisation.layouts import Layout
from mixt_export.quantisation.settings import Quantisation


def find_matrices(
    lowered: LoweredModel, settings: Quantisation, embedding: str, layout: Layout
) -> dict[str, tuple[QuantisedMatrix, list[Use]]]:
    """The matrices of ``lowered`` worth quantising, by name of their initializer, and where each is read.

    A matrix qualifies when products are all that reads it (and, of the table ``embedding``, the lookup of rows), always
    along the same axis, and when it has ``settings.min_elements`` elements and a whole block of inputs. Windows of a
    MixT and cores merged or moved for a chain stay as they are: they are small, and lie in a cache whatever they are.
    So does a core that other matrices of the graph are made of as well: a tensor has one value, whoever reads it.
    ``layout`` says which blocks the dialect's products take.
    """
    functions = {identifier: _operands(function) for identifier, function in lowered.model.functions.items()}
    readers = Counter(
        part
        for name in lowered.model.graph.initializers
        for part in {*lowered.weights.parts.get(name, ()), *lowered.weights.sources.get(name, ())}
    )
    called = _called(lowered.weights)
    dtype = lowered.weights.dtype
    scale_dtype = dtype if layout.positive or dtype != "float32" else ""
    found = {}
    for name, value in lowered.model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or value.dtype != DTYPES[dtype] or len(tensor.shape) != 2:
            continue
        uses = [_use(node, index, functions) for node, index in value.uses()]
        layouts = {use.transposed for use in uses if use is not None}
        if None in uses or len(layouts) != 1:
            continue
        (transposed,) = layouts
        sizes = tensor.shape.numpy()
        columns, rows = sizes if transposed else sizes[::-1]
        lookup = any(use is not None and use.node.op_type == "Gather" for use in uses)
        table = lookup or any(use is not None and (use.node.name or "").startswith("/lm_head/") for use in uses)
        if (lookup and name != embedding) or (table and not layout.tables) or rows * columns < settings.min_elements:
            continue
        parts = lowered.weights.parts.get(name, ())
        names = (name, *(called[part] for part in parts if part in called))
        bits, group = layout.fitted(settings.bits_of(names, table), settings.group, columns)
        if columns < group or (lookup and columns % group):
            continue
        read = _reader(lowered.weights, tensor, transposed)
        if (not parts and not name.endswith(".dense")) or any(readers[part] > 1 for part in parts):
            continue
        flipped = transposed != (name in lowered.weights.flipped)
        matrix = QuantisedMatrix(name, rows, columns, transposed, bits, group, parts, flipped, table, scale_dtype, read)
        found[name] = (matrix, [use for use in uses if use is not None])
    return found


def quantise(
    lowered: LoweredModel,
    dialect: Dialect,
    found: Mapping[str, tuple[QuantisedMatrix, list[Use]]],
    rounded: Rounded,
) -> None:
    """Replace the matrices ``found`` in ``lowered`` by blocks, whose bytes come from ``rounded`` when written."""
    model, weights = lowered.model, lowered.weights
    kept = {
        name: value.const_value
        for name, value in model.graph.initializers.items()
        if name not in found and value.const_value is not None and _external(value.const_value)
    }
    for name, tensor in weights.rearrange(kept).items():
        model.graph.initializers[name].const_value = tensor
    integer = {name: entry for name, entry in found.items() if entry[0].activations}
    write_dynamic(lowered, integer, rounded)
    _WRITERS[dialect.name](lowered, {name: entry for name, entry in found.items() if name not in integer}, rounded)
    for name in found:
        del model.graph.initializers[name]
    called = {node.op_identifier() for node in model.graph.all_nodes()}
    for identifier in [identifier for identifier in model.functions if identifier not in called]:
        del model.functions[identifier]
    check_dialect(model, dialect)


def _called(weights: Weights) -> dict[str, str]:
    """Factors of linears of two matrices -> what they are called in our own format, whoever stored them.

    LINEAR.core0 reads the input, LINEAR.core1 gives the output.
    """
    found: dict[str, str] = {}
    for name, linear in weights.checkpoint.factors.items():
        for branch in linear.branches:
            if len(branch.cores) == 2 and len(branch.in_modes) == 1:
                ((label, _),) = branch.in_modes
                for core in branch.cores:
                    found[core.tensor.name] = f"{name}.core{int(label not in core.labels)}"
    return found


def _external(tensor: ir.TensorProtocol) -> bool:
    return isinstance(tensor, ir.ExternalTensor)


def _reader(weights: Weights, tensor: ir.TensorProtocol, transposed: bool) -> Reader:
    read = weights.reader(tensor)
    return (lambda: read().T) if transposed else read


def _use(node: ir.Node, index: int, functions: Mapping[Any, dict[int, str]]) -> Use | None:
    """How ``node`` reads its input ``index``, or None where that is no product with a matrix from the right."""
    if node.domain == MIXT_DOMAIN:
        operand = functions.get(node.op_identifier(), {}).get(index)
        return None if operand is None else Use(node, True, operand)
    known = _PRODUCTS.get((node.domain, node.op_type))
    if known is None or known[0] != index:
        return None
    transposed = known[1] and not node.attributes.get_int("transB", 0)
    return Use(node, transposed)


#: Operator -> the input that is the matrix, and whether it is (in, out) there unless transB says otherwise.
_PRODUCTS = {
    ("", "MatMul"): (1, True),
    ("", "Gemm"): (1, True),
    (MICROSOFT_DOMAIN, "FusedMatMul"): (1, True),
    ("", "Gather"): (0, False),
}


def _operands(function: ir.Function) -> dict[int, str]:
    """Inputs of a function that its body only multiplies by, from the right: position -> name."""
    return {
        index: str(value.name)
        for index, value in enumerate(function.inputs)
        if value.uses() and all(node.op_type == "MatMul" and place == 1 for node, place in value.uses())
    }


#: Dialect -> what writes its quantised matrices.
_WRITERS: dict[str, Callable[[LoweredModel, Mapping[str, tuple[QuantisedMatrix, list[Use]]], Rounded], None]] = {
    "ort": write_nbits,
    "portable": write_dequantised,
    "trt10": write_dequantised,
    "trt11": write_dequantised,
}

__all__ = ["QuantisedMatrix", "Rounded", "Use", "find_matrices", "quantise"]
