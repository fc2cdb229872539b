"""Do the integers stand for the weights they were made of? Each matrix beside its source, element by element.

Of factors that were turned first it is their product that is judged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from mixt_export.checkpoints import open_checkpoint
from mixt_export.errors import UsageError
from mixt_export.quantisation.blocks import Blocks, distance
from mixt_export.verification.context import Context
from mixt_export.verification.quantised import Matrix
from mixt_export.verification.result import CheckResult
from mixt_export.verification.turned import product_error, turned_pairs

NAME = "quantised_weights"
TITLE = "Integers and their weights"
#: Sums of squares in float64, added up in another order.
_SAME = 1e-7
#: The same by way of decompositions, whose order of sums is not that of another machine.
_SAME_PRODUCT = 1e-6
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
    stated = _stated(context)
    turned = turned_pairs(stated, context.matrices, checkpoint)
    apart = {matrix.name for _, *both in turned.values() for matrix in both}
    worst, wrong = 0.0, []
    with context.progress.task(TITLE, len(context.matrices)) as advance:
        for matrix in context.matrices.values():
            if matrix.name not in apart:
                blocks = matrix.blocks()
                found = distance(blocks, matrix.source(checkpoint))
                worst = max(worst, found["error"])
                reason = _judge(matrix, blocks, found)
                if reason:
                    wrong.append((matrix.linear, reason))
                advance(1)
        for name, (pair, first, second) in turned.items():
            error = product_error(pair, first, second, checkpoint)
            worst = max(worst, error)
            reason = _judge_product(error, stated[name], (first, second))
            if reason:
                wrong.append((name, reason))
            advance(2)
    metrics = {"matrices": len(context.matrices), "wrong": len(wrong), "largest_error": worst}
    if not wrong:
        return CheckResult(NAME, TITLE, True, "", metrics=dict(metrics))
    where, reason = wrong[0]
    more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    return CheckResult(NAME, TITLE, False, f"{where}: {reason}{more}", where, dict(metrics))


def _stated(context: Context) -> dict[str, float]:
    """Linears whose factors were turned, and the errors of their products, as the manifest says."""
    entry = context.manifest["quantisation"].get("turned", {})
    if not isinstance(entry, dict) or not all(isinstance(error, float) for error in entry.values()):
        raise UsageError(
            f"{context.exported}: the manifest's quantisation.turned is not a number for each linear; export again."
        )
    return entry


def _judge_product(error: float, stated: float, factors: Sequence[Matrix]) -> str:
    """Why the integers of two factors are not those of their product, or an empty string."""
    if not math.isfinite(error):
        return "a scale is NaN or infinite"
    allowed = sum(_allowed(matrix) for matrix in factors)
    if error > allowed:
        return f"the integers of its factors are off by {error:.1%} of their product"
    if not math.isclose(error, stated, rel_tol=_SAME_PRODUCT, abs_tol=1e-12):
        return f"the integers of its factors are off by {error:.6%} of their product, by {stated:.6%} when written"
    return ""


def _allowed(matrix: Matrix) -> float:
    return _LARGEST[matrix.bits] if matrix.inputs is None else _SMOOTHED


def _judge(matrix: Matrix, blocks: Blocks, found: dict[str, float]) -> str:
    """Why the integers are not those of the weights, or an empty string."""
    if not all(math.isfinite(value) for value in found.values()):
        return "a scale is NaN or infinite"
    if found["error"] > _allowed(matrix):
        return f"its integers are off by {found['error']:.1%} of the weights"
    if not math.isclose(found["error"], matrix.error, rel_tol=_SAME, abs_tol=1e-12):
        return f"its integers are off by {found['error']:.6%} of the weights, by {matrix.error:.6%} when written"
    if not math.isclose(found["steps"], matrix.steps, rel_tol=1e-6):
        return f"an integer is off by {found['steps']:.3g} steps, by at most {matrix.steps:.3g} when written"
    return ""
