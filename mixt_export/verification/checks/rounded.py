"""Does every value fit into 16 bits? ONNX Runtime's CPU keeps wide what it computes; a device does not."""

from __future__ import annotations

from mixt_export.verification.checks.compare import logits_result
from mixt_export.verification.context import Context
from mixt_export.verification.result import CheckResult
from mixt_export.verification.routes import Pieces

NAME = "rounded"
TITLE = "Rounded to 16 bits"


def applies(context: Context) -> bool:
    """Float16 graphs that the other checks run as ONNX Runtime's CPU does."""
    return context.graph.dtype == "float16" and not context.graph.rounds


def run(context: Context) -> CheckResult:
    """The probe in one piece, every value of the graph rounded to the type the graph gives it."""
    with context.emulating(True):
        step = context.instrumented().full(context.probe)
    comparison = context.comparison()
    comparison.add(step.logits[0], context.probe_reference[0])
    route = Pieces(context.probe, [len(context.probe)], emulated=True)
    return logits_result(context, NAME, TITLE, comparison, route=route)
