"""The graph as it is used, rounding activations to int8 in blocks: does it compute that, and nothing else?"""

from __future__ import annotations

from mixt_export.verification.alike import beside
from mixt_export.verification.context import Context
from mixt_export.verification.int8_activations import rounding_activations
from mixt_export.verification.int8_cache import float_cache
from mixt_export.verification.result import CheckResult

NAME = "int8_activations"
TITLE = "Activations rounded to int8"


def applies(context: Context) -> bool:
    """Exports with quantised weights whose products round what they read."""
    return any(
        node.op_type == "MatMulNBits"
        for nodes in (context.graph.proto.graph.node, *(function.node for function in context.graph.proto.functions))
        for node in nodes
    )


def run(context: Context) -> CheckResult:
    """The shipped graph, of a cache of 8 bits with a float one, beside PyTorch that rounds what products read."""
    reason, metrics = beside(
        context, float_cache(context.graph), lambda model: rounding_activations(model, context.matrices)
    )
    return CheckResult(NAME, TITLE, not reason, reason, metrics=dict(metrics))
