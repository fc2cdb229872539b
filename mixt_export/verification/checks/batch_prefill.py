"""A ragged, padded batch: every sequence must get what it gets alone."""

from __future__ import annotations

from mixt_export.verification.checks.compare import layer_name, logits_result
from mixt_export.verification.checks.ragged import ragged_batch
from mixt_export.verification.context import Context
from mixt_export.verification.layers import LayerErrors
from mixt_export.verification.result import CheckResult

NAME = "batch_prefill"
TITLE = "Ragged batch, prefill"


def run(context: Context) -> CheckResult:
    """The padded batch through the instrumented graph, the reference one sequence at a time."""
    comparison, runner = context.comparison(), context.instrumented()
    sequences = ragged_batch(context)
    ids, mask = runner.padded(sequences)
    step = runner.run(ids, mask)
    errors = LayerErrors(context.graph.layers)
    for row, tokens in enumerate(sequences):
        where = runner.valid(len(tokens), ids.shape[1])
        expected, layers = context.torch.hidden(tokens)
        comparison.add(step.logits[row, where], expected)
        errors.add([layer[row, where] for layer in step.layers], layers)
    culprit = layer_name(errors.first_beyond(context.gate.layers))
    return logits_result(context, NAME, TITLE, comparison, where=culprit, detail={"batch": len(sequences)})
