"""Dialect ort: past and present as one buffer, larger than the sequence, as the runner and GenAI use it."""

from __future__ import annotations

import numpy as np

from mixt_export.verification.checks.compare import logits_result
from mixt_export.verification.checks.decode import decode_sizes
from mixt_export.verification.context import Context
from mixt_export.verification.result import CheckResult

NAME = "shared_cache"
TITLE = "Shared cache buffer"


def applies(context: Context) -> bool:
    """Only GroupQueryAttention updates its cache in place."""
    return context.graph.dialect == "ort"


def run(context: Context) -> CheckResult:
    """As decode, in place; the buffer is no longer than the rotary tables, which the mask must not exceed."""
    comparison, sizes = context.comparison(), decode_sizes(len(context.probe))
    capacity = min(len(context.probe) + 13, context.max_length)
    actual = np.stack(context.plain().shared_chunks(context.probe, sizes, capacity))
    comparison.add(actual, context.probe_reference[0][np.cumsum(sizes) - 1])
    return logits_result(context, NAME, TITLE, comparison, detail={"capacity": capacity})
