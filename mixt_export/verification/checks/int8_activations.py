"""The graph as it is used, rounding activations to int8: does it compute that, and nothing else?"""

from __future__ import annotations

from mixt_export.verification.alike import beside
from mixt_export.verification.context import Context
from mixt_export.verification.int8_activations import products_apart, rounding_activations
from mixt_export.verification.int8_cache import float_cache
from mixt_export.verification.quantised import ROUNDING
from mixt_export.verification.result import CheckResult

NAME = "int8_activations"
TITLE = "Activations rounded to int8"
#: Sums of int8 products are exact; a number may lie between two codes.
_SAME = 1e-3


def applies(context: Context) -> bool:
    """Exports with quantised weights whose products round what they read."""
    return any(
        node.op_type in ROUNDING
        for nodes in (context.graph.proto.graph.node, *(function.node for function in context.graph.proto.functions))
        for node in nodes
    )


def run(context: Context) -> CheckResult:
    """The shipped graph, of a cache of 8 bits with a float one, beside PyTorch that rounds what products read."""
    reason, metrics = beside(
        context,
        float_cache(context.graph),
        lambda model, sizes: rounding_activations(model, context.matrices, sizes),
    )
    where = ""
    if not reason:
        apart, linear = products_apart(context)
        metrics["products_rel_l2"] = apart
        if apart > _SAME:
            reason, where = f"{linear}: its product of integers is off by {apart:.1e} from float64", linear
    return CheckResult(NAME, TITLE, not reason, reason, where, dict(metrics))
