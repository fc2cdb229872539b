"""Logits at every position of real texts and prompts, batch 1, and every block's output."""

from __future__ import annotations

from mixt_export.verification.checks.compare import layer_name, logits_result
from mixt_export.verification.context import Context
from mixt_export.verification.result import CheckResult

NAME = "teacher_forced"
TITLE = "Logits, all positions"


def run(context: Context) -> CheckResult:
    """Compare window by window; at most one window of logits of each model is held."""
    comparison, runner = context.comparison(), context.instrumented()
    sequences = [*context.sequences.windows, *context.sequences.prompts]
    with context.progress.task(TITLE, len(sequences)) as advance:
        for tokens in sequences:
            step = runner.full(tokens)
            expected, layers = context.torch.hidden(tokens)
            comparison.add(step.logits[0], expected)
            context.layers.add([layer[0] for layer in step.layers], layers)
            advance(1)
    where = layer_name(context.layers.first_beyond(context.gate.layers))
    return logits_result(context, NAME, TITLE, comparison, where=where, detail={"tokens": context.sequences.origin})
