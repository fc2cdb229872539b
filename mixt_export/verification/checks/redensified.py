"""Factors must stay factors: neither the export nor ONNX Runtime's optimiser may multiply them out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mixt_export.verification.context import Context
from mixt_export.verification.memory.optimised import optimised_elements
from mixt_export.verification.memory.weights import checkpoint_size, count_weights, mergeable_elements
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
    stored = checkpoint_size(context.reference, context.graph.layers).elements
    merged = min(_merged(context.manifest), mergeable_elements(context.reference, context.graph.layers))
    planned = stored + merged
    optimised = optimised_elements(context.graph, context.options.threads)
    reason = ""
    if weights.elements > _SLACK * (planned + weights.rope_elements) + _SMALL:
        reason = f"the graph holds {weights.elements} constants where the model folder has {stored}"
        reason += f" and merging was planned to add {merged}" if merged else ""
    elif optimised > _SLACK * weights.elements + _SMALL:
        reason = (
            f"onnxruntime's optimiser turns {weights.elements} constants into {optimised}: "
            "it multiplies factors back together"
        )
    metrics = {
        "constants": weights.elements,
        "planned_constants": planned,
        "merged_constants": merged,
        "optimised_constants": optimised,
        "weight_bytes": weights.nbytes,
    }
    return CheckResult(NAME, TITLE, not reason, reason, metrics=dict(metrics))


def _merged(manifest: Mapping[str, Any]) -> int:
    """Constants that the export chose to add by merging terms of MixT linears, as its manifest declares.

    Never more than its dense matrices have: what is beyond that is no form of a linear. 0 where nothing is declared.
    The manifest comes with the folder under test: `mergeable_elements` bounds what it may declare.
    """
    plan = manifest.get("plan")
    elements = plan.get("elements") if isinstance(plan, dict) else None
    if not isinstance(elements, dict):
        return 0
    sizes = [size for key in ("stored", "planned", "dense") if type(size := elements.get(key)) is int and size >= 0]
    if len(sizes) != 3:
        return 0
    stored, planned, dense = sizes
    return min(planned, dense) - stored
