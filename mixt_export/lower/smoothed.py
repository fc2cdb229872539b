"""Which products of a graph can be smoothed, and by what: found in the finished graph, whatever the family.

A product fits when all that reads its input is such products, and its input comes from a norm with weights of its own,
from an attention whose values one matrix gives, or from a gate times the output of a linear. So does one that reads
nothing but what such a product makes: the second factor of a low rank. All others stay as they are: other factorised
linears, the second linear of an MLP without a gate, a norm that something else reads as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import onnx_ir as ir

from mixt_export.lower.decoder import LoweredModel
from mixt_export.lower.quantised_matrix import QuantisedMatrix, Use
from mixt_export.quantisation.smoothing import Group, Place, Smoothing

Found = Mapping[str, tuple[QuantisedMatrix, list[Use]]]

#: How much of the unevenness moves into the matrices, measured on SmolLM2 (docs/quantisation.md).
POWER = 0.7
#: The same for the input of an MLP's last linear, which is rounded token by token.
POWER_TOKENS = 0.5
_NORMS = ("RMSNormalization", "LayerNormalization")
_PRODUCTS = ("MatMul", "FusedMatMul")
#: Input of GroupQueryAttention that holds values; where it is absent, the first holds queries, keys and values.
_VALUES = 2
#: Its input with the values of earlier tokens.
_CACHE = 4


def find_smoothing(lowered: LoweredModel, found: Found) -> Smoothing:
    """Groups of products among the matrices ``found``; empty where none fits."""
    finder = _Finder(found)
    groups = (finder.group(node) for node in lowered.model.graph)
    return Smoothing([group for group in groups if group is not None])


def with_integer_products(found: Found, smoothing: Smoothing) -> dict[str, tuple[QuantisedMatrix, list[Use]]]:
    """``found`` with a scale for each output and int8 activations, where ``smoothing`` has groups, and behind them."""
    readers, products = smoothing.readers, _products(found)

    def kind(node: ir.Node) -> str:
        group = readers.get(products[node].name)
        if group is not None:
            return "token" if group.tokens else "call"
        before = _only(node.inputs[0])
        return kind(before) if before in products else ""

    kinds = {matrix.name: kind(node) for node, matrix in products.items()}

    def settled(matrix: QuantisedMatrix) -> QuantisedMatrix:
        activations = kinds.get(matrix.name)
        if not activations:
            return matrix
        return replace(matrix, group=matrix.columns, scale_dtype="float32", activations=activations)

    return {name: (settled(matrix), uses) for name, (matrix, uses) in found.items()}


def _products(found: Found) -> dict[ir.Node, QuantisedMatrix]:
    """Products of linears by a matrix that nothing else reads."""
    return {
        uses[0].node: matrix
        for matrix, uses in found.values()
        if len(uses) == 1 and uses[0].node.op_type in _PRODUCTS and not matrix.embedding
    }


class _Finder:
    def __init__(self, found: Found) -> None:
        self._products = _products(found)

    def group(self, node: ir.Node) -> Group | None:
        """Products of what ``node`` makes, with what makes that."""
        output = node.outputs[0]
        readers = self._readers(output)
        if not readers:
            return None
        places = tuple(Place(matrix.name, 0 if matrix.transposed else 1) for matrix in readers)
        makers, power, heads, cache = None, POWER, (1, 1), ""
        if node.op_type in _NORMS:
            makers = _owned(node.inputs[1:])
        elif node.op_type == "GroupQueryAttention":
            heads = _heads(node)
            makers = self._values(node, heads, readers[0].columns)
            past = node.inputs[_CACHE]
            cache = "" if past is None else str(past.name)
        elif node.op_type == "Mul":
            power = POWER_TOKENS
            candidates = (self._made(value, 0, readers[0].columns) for value in reversed(node.inputs))
            makers = next((made for made in candidates if made), None)
        if not makers:
            return None
        return Group(str(output.name), places, makers, power, heads, node.op_type == "Mul", cache)

    def _readers(self, value: ir.Value) -> list[QuantisedMatrix] | None:
        """Matrices of the products that read ``value``; None where anything else does."""
        readers = [self._products.get(node) if index == 0 else None for node, index in value.uses()]
        if not readers or None in readers or value.is_graph_output():
            return None
        return [matrix for matrix in readers if matrix is not None]

    def _values(self, node: ir.Node, heads: tuple[int, int], columns: int) -> tuple[Place, ...] | None:
        """What makes the values of an attention: rows of a matrix, those behind queries and keys where it is packed."""
        kept, share = heads
        if columns % (kept * share):
            return None
        width = columns // (kept * share)
        value = node.inputs[_VALUES]
        if value is None:
            packed = node.inputs[0]
            joint = packed.producer() if packed is not None else None
            if joint is None or joint.op_type == "Concat":
                return None
            return self._made(packed, columns + kept * width, columns + 2 * kept * width)
        return self._made(value, 0, kept * width)

    def _made(self, value: ir.Value | None, begin: int, end: int) -> tuple[Place, ...] | None:
        """The rows from ``begin`` of the matrix of ``end`` rows, and of the bias, that give ``value`` and no other."""
        node = _only(value)
        if node is None or value is None:
            return None
        biases: tuple[Place, ...] = ()
        if node.op_type == "Add":
            owned = [_owned([operand]) for operand in node.inputs]
            place = next((place for place in owned if place), None)
            inner = next((operand for operand, place in zip(node.inputs, owned, strict=True) if not place), None)
            node = _only(inner)
            if place is None or node is None:
                return None
            biases = (replace(place[0], begin=begin),)
        matrix = self._products.get(node)
        if matrix is None or matrix.rows != end:
            return None
        return Place(matrix.name, 1 if matrix.transposed else 0, begin), *biases


def _only(value: ir.Value | None) -> ir.Node | None:
    """What makes ``value``, where one node reads it."""
    return None if value is None or len(value.uses()) != 1 or value.is_graph_output() else value.producer()


def _owned(values: Sequence[ir.Value | None]) -> tuple[Place, ...] | None:
    """The vectors ``values`` of a file that one node each reads; None where one is anything else."""
    places = []
    for value in values:
        tensor = None if value is None else value.const_value
        if value is None or not isinstance(tensor, ir.ExternalTensor):
            return None
        if len(tensor.shape) != 1 or len(value.uses()) != 1:
            return None
        places.append(Place(str(value.name)))
    return tuple(places)


def _heads(node: ir.Node) -> tuple[int, int]:
    """Keys and values, and how many heads read each."""
    kept = node.attributes.get_int("kv_num_heads", 1)
    return kept, node.attributes.get_int("num_heads", 1) // kept
