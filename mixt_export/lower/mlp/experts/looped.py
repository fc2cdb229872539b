"""Experts in a loop over blocks of rows: every shape follows from the number of tokens, weights are picked by index.

The rows of each expert are padded to whole blocks of `ROWS` (as grouped products on GPUs are, arXiv:2211.15841), so a
block has one expert. A pass of the loop picks that expert's matrices out of stacked ones: memory for one expert,
however long the prompt. Blocks beyond the last used one compute rows that nobody reads.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from mixt_export.errors import UnsupportedError
from mixt_export.families.wiring import MoeMlp
from mixt_export.lower.builder import Dim
from mixt_export.lower.context import Context
from mixt_export.lower.elementwise import type_of
from mixt_export.lower.mlp.experts.kinds import Kind, gated
from mixt_export.lower.mlp.experts.routing import INT64, PAIRS, Nodes, Route, first_rows, place, sources
from mixt_export.lower.mlp.experts.shared import chain_or_none
from mixt_export.lower.precision import WIDE, dims
from mixt_export.network import TensorRef

#: Rows of a block: the least that a tensor core's product does not waste.
ROWS = 16

_SLOTS, _BLOCKS = "slots", "blocks"


def run_looped(
    context: Context,
    moe: MoeMlp,
    routed: Route,
    kinds: tuple[Kind, Kind, Kind],
    read: tuple[ir.Value, ir.Value],
    node: str,
) -> ir.Value:
    """As `apart.run_apart`. Raises UnsupportedError where the experts' factors differ in structure or size."""
    n, count, k = Nodes(context, node), len(moe.experts), moe.top_k
    gate, up, down = kinds
    piles = [_piles(context, kind) for kind in kinds]
    blocks = _whole_blocks(n, routed.counts, count)
    first = first_rows(n, blocks, count)
    start = n.op("Mul", [first, n.number(ROWS)], "placing/start", WIDE, [count])
    row = place(n, routed, start, k, count)
    total = _most_blocks(n, row, count)
    slots = n.op("Mul", [total, n.whole(ROWS)], "placing/slots", INT64, [])
    source = sources(n, row, slots, _SLOTS, k)
    last = n.op("Add", [first, blocks], "placing/end", WIDE, [count])
    expert_of = _expert_of_block(n, last, total, count)
    inputs = [_blocked(n, gate, read[0], source)]
    inputs += [] if read[0] is read[1] else [_blocked(n, up, read[1], source)]
    with context.builder.body() as nodes:
        number = _value(f"{node}/loop/block", INT64, [])
        condition = _value(f"{node}/loop/condition", ir.DataType.BOOL, [])
        inner = Nodes(context, f"{node}/loop")
        expert = inner.op("Gather", [expert_of, number], "expert", INT64, [], axis=0)
        rows = [
            inner.op("Gather", [x, number], f"rows_{at}", type_of(x), dims(x)[1:], axis=0)
            for at, x in enumerate(inputs)
        ]
        g = gate.finish(_chain(context, gate, piles[0], rows[0], expert))
        u = up.finish(_chain(context, up, piles[1], rows[-1], expert))
        h = gated(context, kinds, moe.experts[0].activation, (g, u), f"{node}/loop")
        y = _chain(context, down, piles[2], down.begin(h, ROWS), expert)
        going = inner.op("Identity", [condition], "going_on", ir.DataType.BOOL, [])
    body = ir.Graph([number, condition], [going, y], nodes=nodes, name=f"{node}/loop")
    features = down.inside[1]
    true = context.builder.constant(np.array(True), "true")
    shape: list[Dim] = [_BLOCKS, 1, ROWS, features]
    done = context.builder.op("Loop", [total, true], name=f"{node}/Loop", dtype=context.dtype, shape=shape, body=body)
    flat = n.op("Reshape", [done, n.vector([1, -1, features])], "slots", context.dtype, [1, _SLOTS, features])
    back = n.op("Reshape", [row, n.vector([-1])], "row_of_pair", INT64, [PAIRS])
    return n.op("Gather", [flat, back], "back", context.dtype, [1, PAIRS, features], axis=1)


def _whole_blocks(n: Nodes, counts: ir.Value, count: int) -> ir.Value:
    """Blocks of each expert, (experts,) float32: rows divided by `ROWS`, rounded up."""
    padded = n.op("Add", [counts, n.number(ROWS - 1)], "placing/padded", WIDE, [count])
    share = n.op("Mul", [padded, n.number(1 / ROWS)], "placing/share", WIDE, [count])
    whole = n.op("Cast", [share], "placing/whole", ir.DataType.INT32, [count], to=ir.DataType.INT32)
    return n.op("Cast", [whole], "placing/blocks", WIDE, [count], to=WIDE)


def _most_blocks(n: Nodes, row: ir.Value, count: int) -> ir.Value:
    """The most blocks that so many pairs can fill, int64: each expert in use wastes at most `ROWS` - 1 rows."""
    flat = n.op("Reshape", [row, n.vector([-1])], "placing/pairs_flat", INT64, [PAIRS])
    pairs = n.size(flat, 0, "placing/pair_count")
    used = n.op("Min", [pairs, n.whole(count)], "placing/most_experts", INT64, [])
    waste = n.op("Mul", [used, n.whole(ROWS - 1)], "placing/most_waste", INT64, [])
    most = n.op("Add", [pairs, waste], "placing/most_rows", INT64, [])
    return n.op("Div", [most, n.whole(ROWS)], "placing/most_blocks", INT64, [])


def _expert_of_block(n: Nodes, end: ir.Value, total: ir.Value, count: int) -> ir.Value:
    """(blocks,) int64: how many experts' blocks ``end`` (experts,) at or before each block; the last one at most."""
    numbers = n.op("Range", [n.whole(0), total, n.whole(1)], "placing/block_numbers", INT64, [_BLOCKS])
    wide = n.op("Cast", [numbers], "placing/block_numbers_wide", WIDE, [_BLOCKS], to=WIDE)
    column = n.op("Unsqueeze", [wide, n.vector([1])], "placing/block_column", WIDE, [_BLOCKS, 1])
    over = n.op("LessOrEqual", [end, column], "placing/is_over", ir.DataType.BOOL, [_BLOCKS, count])
    ones = n.op("Cast", [over], "placing/over", WIDE, [_BLOCKS, count], to=WIDE)
    passed = n.op("ReduceSum", [ones, n.vector([1])], "placing/passed", WIDE, [_BLOCKS], keepdims=0)
    bounded = n.op("Min", [passed, n.number(count - 1)], "placing/bounded", WIDE, [_BLOCKS])
    return n.op("Cast", [bounded], "placing/expert", INT64, [_BLOCKS], to=INT64)


def _blocked(n: Nodes, kind: Kind, x: ir.Value, source: ir.Value) -> ir.Value:
    """Rows of x (1, tokens, r) as (blocks, 1, ROWS, r)."""
    features, name = kind.inside[0], kind.node.removeprefix(f"{n.node}/")
    rows = n.op("Gather", [x, source], f"{name}/placed", type_of(x), [1, _SLOTS, features], axis=1)
    shape = [-1, 1, ROWS, features]
    return n.op("Reshape", [rows, n.vector(shape)], f"{name}/blocks", type_of(x), [_BLOCKS, *shape[1:]])


def _value(name: str, dtype: ir.DataType, shape: list[int]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


_Pile = tuple[ir.Value, bool]
"""A matrix of all experts: (experts, a, b), of which one is picked, or (a, b) that all share (False)."""


def _chain(context: Context, kind: Kind, piles: Sequence[_Pile], x: ir.Value, expert: ir.Value) -> ir.Value:
    """X (1, ROWS, in) times the matrices of ``expert``."""
    node = f"{kind.node}/loop"
    for number, (pile, picked) in enumerate(piles):
        shape = dims(pile)[-2:]
        matrix = pile
        if picked:
            matrix = context.builder.op(
                "Gather", [pile, expert], name=f"{node}/matrix{number}", dtype=context.dtype, shape=shape, axis=0
            )
        name = f"{node}/MatMul{number}"
        x = context.builder.op("MatMul", [x, matrix], name=name, dtype=context.dtype, shape=[1, ROWS, shape[1]])
    return x


def _piles(context: Context, kind: Kind) -> list[_Pile]:
    """The matrices of a kind's own part, each of all experts at once."""
    weights, builder, stem = context.weights, context.builder, kind.linears[0].name.rsplit(".", 2)[0]
    label = f"{stem}.{kind.linears[0].name.rsplit('.', 1)[-1]}"
    factors = [weights.checkpoint.factors.get(linear.name) for linear in kind.linears]
    if not any(factors):
        for linear in kind.linears:
            weights.expect(f"{linear.name}.weight", linear.stored_shape)
            context.linears.forms[linear.name] = "dense"
        names = [f"{linear.name}.weight" for linear in kind.linears]
        return [(builder.initializer(weights.piled(names, f"{label}.weight", transpose=True)), True)]
    chains = [chain_or_none(found) for found in factors]
    middles = kind.shared.middles if kind.shared is not None else [chain for chain in chains if chain is not None]
    if len(middles) < len(kind.linears) or len({tuple(ref.shape for ref in chain) for chain in middles}) > 1:
        raise UnsupportedError(
            f"{label}: TensorRT runs the experts of a layer in a loop over stacked weights, which takes factors of one "
            "structure and rank for all of them; use uniform ranks (--ranks uniform) or --method td-moe, or export "
            "with --target ort or onnx."
        )
    return [_pile(context, position, f"{label}.core{at}") for at, position in enumerate(zip(*middles, strict=True))]


def _pile(context: Context, refs: Sequence[TensorRef], name: str) -> _Pile:
    names = [ref.name for ref in refs]
    if len(set(names)) == 1:
        return context.builder.initializer(context.weights.tensor(names[0])), False
    return context.builder.initializer(context.weights.piled(names, name, transpose=False)), True
