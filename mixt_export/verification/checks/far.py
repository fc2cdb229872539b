"""Far positions: the last that the model has room for, behind a long cache, past every window of attention.

The cache is that of a short text over and over, so a long text need not be run first.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from mixt_export.verification.checks.compare import logits_result
from mixt_export.verification.context import Context
from mixt_export.verification.far_probe import SIZES, far_length
from mixt_export.verification.result import CheckResult, Metric
from mixt_export.verification.routes import Pieces

NAME = "far"
TITLE = "Far positions"


def applies(context: Context) -> bool:
    """Where there are positions beyond those that the other checks reach."""
    return far_length(context.graph, context.config, context.max_length) > len(context.probe)


def run(context: Context) -> CheckResult:
    """Both models go on from the same keys and values; compare after every piece."""
    tokens, past = context.far
    length, runner = past[0].shape[2], context.plain()
    with context.torch.behind(past):
        expected = context.torch.logits(tokens)
    cache, start, rows = runner.given(past), 0, []
    for size in SIZES:
        end = start + size
        mask = np.ones((1, length + end), np.int64)
        step = runner.run(tokens[None, start:end], mask, cache, want_cache=True)
        rows.append(step.logits[0, -1])
        cache, start = step.cache, end
    comparison = context.comparison()
    comparison.add(np.stack(rows), expected[np.cumsum(SIZES) - 1])
    gate = dataclasses.replace(context.gate, tolerance=max(context.gate.tolerance, context.gate.far))
    detail: dict[str, Metric] = {"positions_before": length}
    route = Pieces(tokens, SIZES, past)
    return logits_result(context, NAME, TITLE, comparison, route=route, detail=detail, gate=gate)
