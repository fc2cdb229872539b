"""Logits at every position of real texts and prompts, batch 1, and every block's output."""

from __future__ import annotations

from mixt_export.verification.checks.compare import logits_result
from mixt_export.verification.context import Context
from mixt_export.verification.metrics import relative_l2
from mixt_export.verification.result import CheckResult
from mixt_export.verification.routes import Pieces

NAME = "teacher_forced"
TITLE = "Logits, all positions"


def run(context: Context) -> CheckResult:
    """Compare window by window; at most one window of logits of each model is held."""
    comparison, runner = context.comparison(), context.instrumented()
    sequences = [*context.sequences.windows, *context.sequences.prompts]
    largest, worst = -1.0, sequences[0]
    with context.progress.task(TITLE, len(sequences)) as advance:
        for tokens in sequences:
            step = runner.full(tokens)
            expected, layers = context.torch.hidden(tokens)
            comparison.add(step.logits[0], expected)
            context.layers.add([layer[0] for layer in step.layers], layers)
            error = relative_l2(step.logits[0], expected)
            if error > largest:
                largest, worst = error, tokens
            advance(1)
    route = Pieces(worst, [len(worst)])
    return logits_result(context, NAME, TITLE, comparison, route=route, detail={"tokens": context.sequences.origin})
