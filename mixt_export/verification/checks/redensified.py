"""Factors must stay factors: neither the export nor ONNX Runtime's optimiser may multiply them out."""

from __future__ import annotations

from mixt_export.verification.context import Context
from mixt_export.verification.memory.optimised import optimised_elements
from mixt_export.verification.memory.weights import checkpoint_size, count_weights
from mixt_export.verification.result import CheckResult

NAME = "redensified"
TITLE = "Factors stay factors"
_SLACK = 1.05
#: Masks, shapes, scalars: constants that no checkpoint holds.
_SMALL = 1 << 16


def run(context: Context) -> CheckResult:
    """Compare numbers of constants, not bytes: the CPU runtime widens float16 weights to float32 by itself."""
    context.close()  # its memory is needed for the optimiser's copy
    weights = count_weights(context.graph.proto)
    planned = checkpoint_size(context.reference, context.graph.layers).elements
    optimised = optimised_elements(context.graph, context.options.threads)
    reason = ""
    if weights.elements > _SLACK * (planned + weights.rope_elements) + _SMALL:
        reason = f"the graph holds {weights.elements} constants where the model folder has {planned}"
    elif optimised > _SLACK * weights.elements + _SMALL:
        reason = (
            f"onnxruntime's optimiser turns {weights.elements} constants into {optimised}: "
            "it multiplies factors back together"
        )
    metrics = {
        "constants": weights.elements,
        "planned_constants": planned,
        "optimised_constants": optimised,
        "weight_bytes": weights.nbytes,
    }
    return CheckResult(NAME, TITLE, not reason, reason, metrics=dict(metrics))
