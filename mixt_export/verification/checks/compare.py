"""What several checks do the same way: judge logits, keep how to repeat the run that failed."""

from __future__ import annotations

from mixt_export.verification.context import Context
from mixt_export.verification.gate import Gate
from mixt_export.verification.metrics import LogitsComparison
from mixt_export.verification.result import CheckResult, Metric
from mixt_export.verification.routes import Route


def logits_result(
    context: Context,
    name: str,
    title: str,
    comparison: LogitsComparison,
    *,
    route: Route | None = None,
    detail: dict[str, Metric] | None = None,
    gate: Gate | None = None,
) -> CheckResult:
    """Judge ``comparison`` by ``gate``, by default the model's.

    ``route`` is how to run the same again, to find the fault if there is one.
    """
    gate = gate or context.gate
    reason = gate.judge(comparison)
    if reason and route is not None:
        context.routes[name] = route
    metrics: dict[str, Metric] = {**(detail or {}), **comparison.as_metrics(), "tolerance": gate.tolerance}
    return CheckResult(name, title, not reason, reason, metrics=metrics)
