"""Do the integers stand for the weights they were made of? Each matrix beside its source, element by element."""

from __future__ import annotations

import math

from mixt_export.checkpoints import open_checkpoint
from mixt_export.quantisation.blocks import Blocks, distance
from mixt_export.verification.context import Context
from mixt_export.verification.quantised import Matrix
from mixt_export.verification.result import CheckResult

NAME = "quantised_weights"
TITLE = "Integers and their weights"
#: Sums of squares in float64, added up in another order.
_SAME = 1e-7
#: Relative Frobenius error beyond which integers of so many bits stand for other weights, whatever a manifest says:
#: rounding to nearest gives 0.3 / 2^(bits-1) for normally distributed weights, calibration up to twice that.
_LARGEST = {4: 0.25, 8: 0.02}
#: The same where one scale serves a row whose columns were multiplied by factors of their own: 3.5 % in SmolLM2.
_SMOOTHED = 0.06


def applies(context: Context) -> bool:
    """Exports with quantised weights."""
    return bool(context.matrices)


def run(context: Context) -> CheckResult:
    """Recompute what the exporter wrote down: one changed element of a matrix changes its error."""
    checkpoint = open_checkpoint(context.reference)
    worst, wrong = 0.0, []
    with context.progress.task(TITLE, len(context.matrices)) as advance:
        for matrix in context.matrices.values():
            blocks = matrix.blocks()
            found = distance(blocks, matrix.source(checkpoint))
            worst = max(worst, found["error"])
            reason = _judge(matrix, blocks, found)
            if reason:
                wrong.append((matrix.linear, reason))
            advance(1)
    metrics = {"matrices": len(context.matrices), "wrong": len(wrong), "largest_error": worst}
    if not wrong:
        return CheckResult(NAME, TITLE, True, "", metrics=dict(metrics))
    where, reason = wrong[0]
    more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    return CheckResult(NAME, TITLE, False, f"{where}: {reason}{more}", where, dict(metrics))


def _judge(matrix: Matrix, blocks: Blocks, found: dict[str, float]) -> str:
    """Why the integers are not those of the weights, or an empty string."""
    if not all(math.isfinite(value) for value in found.values()):
        return "a scale is NaN or infinite"
    if found["error"] > (_LARGEST[blocks.bits] if matrix.inputs is None else _SMOOTHED):
        return f"its integers are off by {found['error']:.1%} of the weights"
    if not math.isclose(found["error"], matrix.error, rel_tol=_SAME, abs_tol=1e-12):
        return f"its integers are off by {found['error']:.6%} of the weights, by {matrix.error:.6%} when written"
    if not math.isclose(found["steps"], matrix.steps, rel_tol=1e-6):
        return f"an integer is off by {found['steps']:.3g} steps, by at most {matrix.steps:.3g} when written"
    return ""
