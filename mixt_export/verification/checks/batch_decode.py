"""A ragged batch through the graph as it is: the last valid position of each row, then steps with the cache."""

from __future__ import annotations

import numpy as np

from mixt_export.verification.checks.compare import logits_result
from mixt_export.verification.checks.ragged import DECODED, ragged_batch
from mixt_export.verification.context import Context
from mixt_export.verification.result import CheckResult, Metric
from mixt_export.verification.routes import Ragged

NAME = "batch_decode"
TITLE = "Ragged batch, decode"


def run(context: Context) -> CheckResult:
    """Prefill the batch, append DECODED given tokens one at a time; compare every row after every run."""
    comparison, runner = context.comparison(), context.plain()
    sequences = ragged_batch(context)
    more = np.stack([np.resize(context.probe[row:], DECODED) for row in range(len(sequences))])
    ids, mask = runner.padded(sequences)
    step = runner.run(ids, mask, want_cache=True)
    rows = [step.logits[:, -1]]
    for turn in range(DECODED):
        mask = runner.grow(mask)
        step = runner.run(more[:, turn : turn + 1], mask, step.cache, want_cache=True)
        rows.append(step.logits[:, -1])
    actual = np.stack(rows, axis=1)
    for row, tokens in enumerate(sequences):
        expected = context.torch.logits(np.concatenate([tokens, more[row]]))
        comparison.add(actual[row], expected[len(tokens) - 1 :])
    detail: dict[str, Metric] = {"batch": len(sequences), "decoded": DECODED}
    return logits_result(context, NAME, TITLE, comparison, route=Ragged(sequences, more), detail=detail)
