"""Decode with the cache, token by token, against the reference's full pass."""

from __future__ import annotations

import numpy as np

from mixt_export.verification.checks.compare import logits_result
from mixt_export.verification.context import Context
from mixt_export.verification.result import CheckResult
from mixt_export.verification.routes import Pieces

NAME = "decode"
TITLE = "Token-by-token decode"


def decode_sizes(length: int) -> list[int]:
    """A third of the tokens as prompt, the rest one by one."""
    prompt = max(length // 3, 1)
    return [prompt, *[1] * (length - prompt)]


def run(context: Context) -> CheckResult:
    """Feed the reference's own tokens and compare after each."""
    comparison, sizes = context.comparison(), decode_sizes(len(context.probe))
    actual = np.stack(context.plain().chunks(context.probe, sizes))
    comparison.add(actual, context.probe_reference[0][np.cumsum(sizes) - 1])
    return logits_result(context, NAME, TITLE, comparison, route=Pieces(context.probe, sizes))
