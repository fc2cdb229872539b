"""Experts one by one: rows laid out expert by expert are cut at runtime, each piece runs through its expert's nodes.

Exactly the needed products, weights where they lie in the checkpoint, every expert with factors of its own; the price
is a node per expert and linear, and sizes that depend on the data. An expert that nobody chose gets zero rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from mixt_export.families.wiring import MoeMlp
from mixt_export.lower.builder import Dim
from mixt_export.lower.context import Context, stem
from mixt_export.lower.elementwise import type_of
from mixt_export.lower.linear import lower_linear
from mixt_export.lower.mlp.experts.kinds import Kind, gated
from mixt_export.lower.mlp.experts.routing import INT64, PAIRS, Nodes, Route, first_rows, place, sources
from mixt_export.lower.precision import dims


def run_apart(
    context: Context,
    moe: MoeMlp,
    routed: Route,
    kinds: tuple[Kind, Kind, Kind],
    read: tuple[ir.Value, ir.Value],
    node: str,
) -> ir.Value:
    """Outputs of the experts' own part of down, (1, pairs, r), pairs in the order token · k + choice.

    ``read``: what the experts' own parts of gate and up read, (1, tokens, r).
    """
    n, count, k = Nodes(context, node), len(moe.experts), moe.top_k
    gate, up, down = kinds
    row = place(n, routed, first_rows(n, routed.counts, count), k, count)
    flat = n.op("Reshape", [row, n.vector([-1])], "row_of_pair", INT64, [PAIRS])
    source = sources(n, row, n.size(flat, 0, "pairs"), PAIRS, k)
    lengths = n.op("Cast", [routed.counts], "lengths", INT64, [count], to=INT64)
    opened = _by_expert(context, gate, read[0], source, lengths)
    closed = _by_expert(context, up, read[1], source, lengths, None if read[0] is not read[1] else opened.pieces)
    hidden = gated(context, kinds, moe.experts[0].activation, (opened.y, closed.y), node)
    pieces = _cut(context, down.begin(hidden, PAIRS), lengths, down)
    y = _run(context, down, pieces)
    return n.op("Gather", [y, flat], "back", type_of(y), [1, PAIRS, down.inside[1]], axis=1)


class _Done:
    """Outputs (1, pairs, out) of a kind, expert by expert, and the pieces that its experts read."""

    def __init__(self, y: ir.Value, pieces: Sequence[ir.Value]) -> None:
        self.y, self.pieces = y, pieces


def _by_expert(
    context: Context,
    kind: Kind,
    x: ir.Value,
    source: ir.Value,
    lengths: ir.Value,
    pieces: Sequence[ir.Value] | None = None,
) -> _Done:
    """Lay the rows of x (1, tokens, r) out expert by expert, cut them, run each expert; ``pieces``: cut already."""
    if pieces is None:
        sorted_rows = context.builder.op(
            "Gather",
            [x, source],
            name=f"{kind.node}/sorted",
            dtype=type_of(x),
            shape=[1, PAIRS, kind.inside[0]],
            axis=1,
        )
        pieces = _cut(context, sorted_rows, lengths, kind)
    return _Done(kind.finish(_run(context, kind, pieces)), pieces)


def _cut(context: Context, x: ir.Value, lengths: ir.Value, kind: Kind) -> Sequence[ir.Value]:
    """X (1, pairs, r) in pieces of ``lengths`` rows, one per expert."""
    layer = kind.node.split("layers.")[-1].split("/")[0]
    shapes: list[list[Dim]] = [[1, f"rows_{layer}_{expert}", dims(x)[2]] for expert in range(len(kind.linears))]
    outputs = [(type_of(x), shape) for shape in shapes]
    return context.builder.ops("Split", [x, lengths], name=f"{kind.node}/Split", outputs=outputs, axis=1)


def _run(context: Context, kind: Kind, pieces: Sequence[ir.Value]) -> ir.Value:
    """The experts' own part on their pieces, joined again: (1, pairs, out)."""
    done = []
    for expert, piece in enumerate(pieces):
        y = _own(context, kind, expert, piece)
        y.shape = ir.Shape([1, dims(piece)[1], kind.inside[1]])
        done.append(y)
    return context.builder.op(
        "Concat", done, name=f"{kind.node}/Concat", dtype=type_of(done[0]), shape=[1, PAIRS, kind.inside[1]], axis=1
    )


def _own(context: Context, kind: Kind, expert: int, x: ir.Value) -> ir.Value:
    linear = kind.linears[expert]
    parent = kind.node.rsplit(".", 1)[0]
    node = f"{parent}.{expert}/{stem(linear.name)}"
    matrices = kind.own(expert)
    if matrices is None:
        return lower_linear(context.linears, linear, x, node)
    for number, matrix in enumerate(matrices):
        value = context.builder.initializer(context.weights.tensor(matrix.name))
        name = f"{node}/core{number}/MatMul"
        x = context.builder.op(
            "MatMul", [x, value], name=name, dtype=context.dtype, shape=[1, dims(x)[1], matrix.shape[1]]
        )
    return x
