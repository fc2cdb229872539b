"""Second moments for matrices on the way to an attention's values: of their inputs as the attention mixes them.

An error δ of a value matrix reaches what a head gives as Σ_t a_st δ x_t = δ (A x)_s, A the head's attention weights. So
its loss is tr(δ M δᵀ) with M the second moments of A x, not of x: first tokens of a window, on which heads rest that
look for nothing, count as often as they are looked at. In SmolLM2-135M this divides what rounding the value matrices to
int4 costs by eight (docs/quantisation.md). A x is found by the attention node itself, given pieces of x as its values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

#: Operators that mix values -> attributes that hold how many heads ask, and how many keys and values there are.
ATTENTIONS = {"GroupQueryAttention": ("num_heads", "kv_num_heads"), "Attention": ("q_num_heads", "kv_num_heads")}
PRODUCTS = frozenset({"MatMul", "FusedMatMul", "Gemm"})


@dataclass(frozen=True)
class Part:
    """Rows ``begin`` to ``end`` (None: the last) of a matrix (outputs, inputs) and the output with their moments."""

    output: str
    begin: int = 0
    end: int | None = None


@dataclass
class Observation:
    """Nodes and constants that make moments, and which matrix is to be rounded by which."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)
    parts: dict[str, list[Part]] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)
    """Rows and columns of what each output holds."""

    def op(self, op_type: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        """Add a node; its only output, which has its name."""
        self.nodes.append(helper.make_node(op_type, list(inputs), [name], name=name, **attributes))
        return name

    def ints(self, name: str, *values: int) -> str:
        """Add an int64 constant."""
        self.constants.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    def cut(self, source: str, axis: int, begin: int, end: int, name: str) -> str:
        """``source`` from ``begin`` to ``end`` along ``axis``."""
        bounds = [
            self.ints(f"{name}/{what}", value) for what, value in (("begin", begin), ("end", end), ("axis", axis))
        ]
        return self.op("Slice", [source, *bounds], name)

    def moments(self, source: str, columns: int, name: str) -> str:
        """Σ x xᵀ (columns, columns) over all but the last axis of ``source``; an output of the graph."""
        rows = self.op("Reshape", [source, self.ints(f"{name}/shape", -1, columns)], f"{name}/rows")
        self.widths[name] = columns
        return self.op("Gemm", [rows, rows], name, transA=1)


@dataclass(frozen=True)
class _Step:
    """A product on the way to the values: what it reads, its matrix and that matrix's (outputs, inputs)."""

    source: str
    matrix: str
    rows: int
    columns: int


def observe_values(
    found: Observation,
    attention: onnx.NodeProto,
    producers: Mapping[str, onnx.NodeProto],
    sizes: Mapping[str, tuple[int, ...]],
    wanted: frozenset[str],
) -> None:
    """Add to ``found`` the moments for the matrices among ``wanted`` that lead to the values of ``attention``.

    ``producers``: the nodes by their outputs; ``sizes``: of constants and of matrices. A way ends at the first operator
    that is no product by a matrix and no bias: what lies before it is rounded by what it reads.
    """
    heads, groups = (_number(attention, name) for name in ATTENTIONS[attention.op_type])
    query, key, value = attention.input[:3]
    packed = not key
    joint = producers.get(query) if packed else None
    if joint is not None and joint.op_type == "Concat" and len(joint.input) == 3:
        value = joint.input[2]
    elif packed:
        value = query
    steps = _way(value, producers, sizes)
    if not steps or not groups:
        return
    whole = value == query  # one matrix gives queries, keys and values
    width = steps[0].rows // (heads + 2 * groups if whole else groups)
    node = _Attention(attention, heads, groups, width, packed)
    for position, step in enumerate(steps[:1] if whole else steps):
        if step.matrix not in wanted:
            continue
        name = f"{attention.output[0]}/mixed/{step.matrix}"
        mixed = node.mix(found, step.source, step.columns, name)
        if position:
            found.parts[step.matrix] = [Part(found.moments(mixed, step.columns, f"{name}/moments"))]
            continue
        first = (heads + groups) * width if whole else 0
        parts = list(found.parts.get(step.matrix, ()))[:1] if whole else []
        parts = [Part(part.output, 0, first) for part in parts]
        share = heads // groups
        for group in range(groups):
            own = found.cut(mixed, 2, group * share, (group + 1) * share, f"{name}/{group}")
            begin = first + group * width
            parts.append(Part(found.moments(own, step.columns, f"{name}/{group}/moments"), begin, begin + width))
        found.parts[step.matrix] = parts


def _way(value: str, producers: Mapping[str, onnx.NodeProto], sizes: Mapping[str, tuple[int, ...]]) -> list[_Step]:
    """Products that lead to ``value``, the last one first."""
    steps = []
    while (node := producers.get(value)) is not None:
        if node.op_type in PRODUCTS and node.input[1] in sizes and not _number(node, "transA"):
            size = sizes[node.input[1]]
            rows, columns = size if _number(node, "transB") else size[::-1]
            steps.append(_Step(node.input[0], node.input[1], rows, columns))
            value = node.input[0]
        elif node.op_type == "Add" and any(name in sizes for name in node.input):
            value = next(name for name in node.input if name not in sizes)
        else:
            break
    return steps


@dataclass(frozen=True)
class _Attention:
    node: onnx.NodeProto
    heads: int
    groups: int
    width: int
    packed: bool

    def mix(self, found: Observation, source: str, columns: int, name: str) -> str:
        """(batch, positions, heads, columns): ``source`` (batch, positions, columns) as each head mixes positions."""
        width, count = self.width, -(-columns // self.width)
        if count * width != columns:
            pads = found.ints(f"{name}/pads", 0, 0, 0, 0, 0, count * width - columns)
            source = found.op("Pad", [source, pads], f"{name}/padded")
        asked, kept = self.heads * width, self.groups * width
        inputs = list(self.node.input)
        if self.packed:
            inputs[1] = found.cut(inputs[0], 2, asked, asked + kept, f"{name}/key")
            inputs[0] = found.cut(inputs[0], 2, 0, asked, f"{name}/query")
        copies = found.ints(f"{name}/copies", 1, 1, self.groups)
        apart = found.ints(f"{name}/apart", 0, 0, self.heads, width)
        pieces = []
        for index in range(count):
            piece = found.cut(source, 2, index * width, (index + 1) * width, f"{name}/piece{index}")
            inputs[2] = found.op("Tile", [piece, copies], f"{name}/values{index}")
            node = onnx.NodeProto()
            node.CopyFrom(self.node)
            node.name = f"{name}/attention{index}"
            node.input[:] = inputs
            node.output[:] = [f"{node.name}/{place}" if output else "" for place, output in enumerate(node.output)]
            found.nodes.append(node)
            pieces.append(found.op("Reshape", [node.output[0], apart], f"{name}/heads{index}"))
        mixed = found.op("Concat", pieces, f"{name}/together", axis=3)
        return mixed if count * width == columns else found.cut(mixed, 3, 0, columns, f"{name}/cut")


def _number(node: onnx.NodeProto, name: str) -> int:
    return next((int(entry.i) for entry in node.attribute if entry.name == name), 0)
