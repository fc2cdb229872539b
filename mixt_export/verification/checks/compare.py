"""What several checks do the same way: judge logits, name the layer when the cache path is at fault."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mixt_export.verification.context import Context
from mixt_export.verification.layers import LayerErrors
from mixt_export.verification.metrics import LogitsComparison
from mixt_export.verification.result import CheckResult, Metric
from mixt_export.verification.session import RunFailed


def layer_name(index: int | None) -> str:
    """How a diverging block is called; None stands for what comes after the last block."""
    return f"model.layers.{index}" if index is not None else "final norm, last position or output projection"


def logits_result(
    context: Context,
    name: str,
    title: str,
    comparison: LogitsComparison,
    *,
    where: str = "",
    detail: dict[str, Metric] | None = None,
) -> CheckResult:
    """Judge ``comparison`` by the gate."""
    reason = context.gate.judge(comparison)
    metrics: dict[str, Metric] = {**(detail or {}), **comparison.as_metrics(), "tolerance": context.gate.tolerance}
    return CheckResult(name, title, not reason, reason, where if reason else "", metrics)


def cached_culprit(context: Context, sizes: Sequence[int]) -> str:
    """Run the probe in chunks through the instrumented graph and name the first block whose output diverges."""
    runner, tokens = context.instrumented(), context.probe
    cache, start = None, 0
    parts: list[list[np.ndarray]] = []
    try:
        for size in sizes:
            end = start + size
            step = runner.run(tokens[None, start:end], np.ones((1, end), np.int64), cache, want_cache=True)
            parts.append([layer[0] for layer in step.layers])
            cache, start = step.cache, end
    except RunFailed:
        return ""
    errors = LayerErrors(context.graph.layers)
    errors.add([np.concatenate(pieces) for pieces in zip(*parts, strict=True)], context.probe_reference[1])
    return layer_name(errors.first_beyond(context.gate.layers))
