"""Mixture of experts: route, run each expert on the rows of the tokens that chose it, sum (arXiv:2101.03961).

Two ways of running them, chosen by the dialect: `apart` gives each expert its own nodes and cuts rows at runtime, which
is fastest on a CPU (docs/moe.md); `looped` keeps every shape a function of the number of tokens, as TensorRT needs.
"""

from __future__ import annotations

import onnx_ir as ir

from mixt_export.errors import UnsupportedError
from mixt_export.families.wiring import MoeMlp
from mixt_export.lower.context import Context
from mixt_export.lower.elementwise import type_of
from mixt_export.lower.mlp.experts.apart import run_apart
from mixt_export.lower.mlp.experts.kinds import Kind, kinds_of
from mixt_export.lower.mlp.experts.looped import run_looped
from mixt_export.lower.mlp.experts.routing import INT64, TOKENS, Nodes, route
from mixt_export.lower.precision import dims


def lower_moe(context: Context, moe: MoeMlp, x: ir.Value, node: str) -> ir.Value:
    """Σ weight · expert(x) over the chosen experts; x (batch, seq, hidden), y alike.

    Raises UnsupportedError for a factorised router and for experts that a dialect cannot run.
    """
    if moe.router.name in context.weights.checkpoint.factors:
        raise UnsupportedError(f"{moe.router.name}: a router cannot be factorised; compress the experts only.")
    n = Nodes(context, node)
    hidden, k = moe.router.in_features, moe.top_k
    rows = n.op("Reshape", [x, n.vector([1, -1, hidden])], "tokens", type_of(x), [1, TOKENS, hidden])
    routed = route(context, moe, rows, node)
    gate, up, down = kinds_of(context, moe, node)
    run = run_looped if context.dialect.typed else run_apart
    pairs = run(context, moe, routed, (gate, up, down), _read(gate, up, rows), node)
    features = down.inside[1]
    apart = n.op("Reshape", [pairs, n.vector([-1, k, features])], "chosen", type_of(pairs), [TOKENS, k, features])
    weight = n.op("Unsqueeze", [routed.weight, n.vector([1])], "weights", type_of(routed.weight), [TOKENS, 1, k])
    if type_of(weight) != type_of(apart):
        weight = context.precision.wide(weight)
    mixed = n.op("MatMul", [weight, apart], "mixed", type_of(apart), [TOKENS, 1, features])
    y = down.finish(
        n.op("Reshape", [mixed, n.vector([1, -1, features])], "rows", type_of(mixed), [1, TOKENS, features])
    )
    shape = n.op("Shape", [x], "shape", INT64, [3])
    return n.op("Reshape", [y, shape], "Reshape", type_of(y), dims(x))


def _read(gate: Kind, up: Kind, rows: ir.Value) -> tuple[ir.Value, ir.Value]:
    """What gate and up of the experts read, (1, tokens, r); one value where both read the same."""
    first = gate.begin(rows, TOKENS)
    if up.reads_like(gate):
        return first, first
    return first, up.begin(rows, TOKENS)
