"""A ragged, padded batch: every sequence must get what it gets alone."""

from __future__ import annotations

import numpy as np

from mixt_export.verification.checks.compare import logits_result
from mixt_export.verification.checks.ragged import ragged_batch
from mixt_export.verification.context import Context
from mixt_export.verification.result import CheckResult
from mixt_export.verification.routes import Ragged

NAME = "batch_prefill"
TITLE = "Ragged batch, prefill"


def run(context: Context) -> CheckResult:
    """The padded batch through the instrumented graph, the reference one sequence at a time."""
    comparison, runner = context.comparison(), context.instrumented()
    sequences = ragged_batch(context)
    ids, mask = runner.padded(sequences)
    step = runner.run(ids, mask)
    for row, tokens in enumerate(sequences):
        where = runner.valid(len(tokens), ids.shape[1])
        comparison.add(step.logits[row, where], context.torch.logits(tokens))
    route = Ragged(sequences, np.zeros((len(sequences), 0), np.int64))
    return logits_result(context, NAME, TITLE, comparison, route=route, detail={"batch": len(sequences)})
