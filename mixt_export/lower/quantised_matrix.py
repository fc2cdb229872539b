"""A matrix of a graph that becomes blocks of integers: what it is, where it is read, where its blocks come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from mixt_export.lower.weights import itemsize
from mixt_export.quantisation.blocks import Blocks, distance, nbytes

Reader = Callable[[], np.ndarray[Any, Any]]


@dataclass(frozen=True)
class QuantisedMatrix:
    """A matrix (``rows``, ``columns``) = (outputs, inputs) of a graph, and how it is written.

    ``name``: of the float initializer in whose place it stands. ``transposed``: that one was (columns, rows).
    ``parts``: the stored tensors that it holds, stacked along their first axis, which is its rows, or with ``flipped``
    its columns; none where it is the dense matrix of a factorised linear. ``embedding``: it is the table of the token
    embedding, or the head. ``scale_dtype``: in which its scales are exact and positive; where it is empty they are any
    float32. ``read()``: the float matrix as (rows, columns), in the graph's dtype. ``activations``: what it is
    multiplied by is int8 as well, with one scale a "call" or one for each "token"; empty: as products of blocks do it.
    """

    name: str
    rows: int
    columns: int
    transposed: bool
    bits: int
    group: int
    parts: tuple[str, ...]
    flipped: bool
    embedding: bool
    scale_dtype: str
    read: Reader = field(compare=False, repr=False)
    activations: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return sum(nbytes(self.rows, self.columns, self.bits, self.group, itemsize(self.scale_dtype or "float32")))

    @property
    def by_row(self) -> bool:
        """Whether it has one scale for each output."""
        return self.group == self.columns and not self.embedding

    @property
    def codes_name(self) -> str:
        """Name of the initializer of the codes."""
        return f"{self.name}.int{self.bits}"

    @property
    def scales_name(self) -> str:
        """Name of the initializer of the scales."""
        return f"{self.name}.scales"


@dataclass(frozen=True)
class Use:
    """Where a graph reads a matrix: ``node``, and for a call of a function ``operand``, its parameter's name."""

    node: ir.Node
    transposed: bool
    operand: str | None = None


@dataclass
class Rounded:
    """Blocks by name of the matrix: those that a calibration ``known``, else by ``fallback`` when first asked for.

    ``read``: the weights (rows, columns) that the blocks stand for, at float32, which ``fallback`` is given as well.
    ``errors``: filled in as they are: ``error``, the relative Frobenius error, and ``steps``, the largest error of an
    element in units of its scale (docs/format.md).
    """

    fallback: Callable[[QuantisedMatrix, np.ndarray[Any, Any]], Blocks]
    known: Callable[[str], Blocks | None] = lambda _name: None
    read: Callable[[QuantisedMatrix], np.ndarray[Any, Any]] = lambda matrix: matrix.read()
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    _last: tuple[str, Blocks] | None = None

    def blocks(self, matrix: QuantisedMatrix) -> Blocks:
        """Codes and scales of ``matrix``; the last ones asked for are kept, as codes and scales are written apart."""
        if self._last is None or self._last[0] != matrix.name:
            self._last = None
            values = self.read(matrix)
            found = self.known(matrix.name) or self.fallback(matrix, values)
            self.errors[matrix.name] = distance(found, values)
            self._last = (matrix.name, found)
        return self._last[1]


def initializer(model: ir.Model, tensor: ir.TensorProtocol) -> ir.Value:
    """Register ``tensor`` in the graph under its name and return its value."""
    name = str(tensor.name)
    value = ir.Value(
        name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
    )
    model.graph.register_initializer(value)
    return value


def replace_node(
    node: ir.Node, op_type: str, inputs: list[ir.Value | None], attributes: Mapping[str, Any], domain: str
) -> None:
    """Put a node of another operator in the place of ``node``, under its name, with the same output."""
    (old,) = node.outputs
    new = ir.Value(name=old.name, type=old.type, shape=old.shape)
    made = ir.node(op_type, inputs, attributes=dict(attributes), domain=domain, name=node.name, outputs=[new])
    assert node.graph is not None
    ir.convenience.replace_nodes_and_values(node.graph, node, [node], [made], [old], [new])
