"""Dialects: which operators a graph may use. What each may contain is data, checked on every written graph."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from mixt_export.errors import MixtError
from mixt_export.lower.builder import MICROSOFT_DOMAIN, MIXT_DOMAIN


@dataclass(frozen=True)
class Dialect:
    """Operators per domain ("*": every operator of the domain), opset, and how batches and the cache are laid out."""

    name: str
    opset: int
    operators: dict[str, frozenset[str]]
    padding: str
    shared_buffer: bool


# fmt: off
_STANDARD = frozenset({
    "Add", "And", "Cast", "CastLike", "Concat", "Constant", "CumSum", "Equal",
    "Expand", "Gather", "GatherND", "Gemm", "Identity", "Less", "LessOrEqual", "MatMul",
    "Max", "Min", "Mul", "Or", "Pad", "RMSNormalization", "Range", "ReduceSum",
    "Reshape", "Shape", "Sigmoid", "Slice", "Split", "Squeeze", "Sub", "Transpose",
    "Unsqueeze",
})
# fmt: on

DIALECTS = {
    dialect.name: dialect
    for dialect in (
        Dialect(
            name="portable",
            opset=23,
            operators={"": _STANDARD | {"Attention", "RotaryEmbedding"}, MIXT_DOMAIN: frozenset("*")},
            padding="left",
            shared_buffer=False,
        ),
        Dialect(
            name="ort",
            opset=23,
            operators={
                "": _STANDARD,
                MICROSOFT_DOMAIN: frozenset(["GroupQueryAttention", "FusedMatMul"]),
                MIXT_DOMAIN: frozenset("*"),
            },
            padding="right",
            shared_buffer=True,
        ),
    )
}


def check_dialect(model: ir.Model, dialect: Dialect) -> None:
    """Every node, function bodies included, is named and of an operator ``dialect`` allows.

    Raises MixtError (internal error: the lowering broke its promise) naming the node.
    """
    bodies = [("graph", list(model.graph.all_nodes()))]
    bodies += [(function.name, list(function.all_nodes())) for function in model.functions.values()]
    for where, nodes in bodies:
        for node in nodes:
            allowed = dialect.operators.get(node.domain, frozenset())
            if "*" not in allowed and node.op_type not in allowed:
                raise MixtError(
                    f"{where}: node {node.name!r} uses {node.domain or 'ai.onnx'}::{node.op_type}, which the dialect "
                    f"{dialect.name} does not contain."
                )
            if not node.name:
                raise MixtError(f"{where}: a {node.op_type} node has no name.")
