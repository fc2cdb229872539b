"""Factors must stay factors: neither the export nor ONNX Runtime's optimiser may multiply them out."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, Protocol

from mixt_export.verification.graph import ExportedGraph
from mixt_export.verification.memory.optimised import optimised_elements
from mixt_export.verification.memory.weights import checkpoint_size, count_weights, merged_elements
from mixt_export.verification.options import VerifyOptions
from mixt_export.verification.quantised import matrices_of
from mixt_export.verification.result import CheckResult

NAME = "redensified"
TITLE = "Factors stay factors"
_SLACK = 1.05
#: Masks, shapes, scalars: constants that no checkpoint holds.
_SMALL = 1 << 16


class Weighed(Protocol):
    """What this check needs of a verification, of a decoder or of an encoder."""

    graph: ExportedGraph
    manifest: dict[str, Any]
    reference: Path
    options: VerifyOptions

    def close(self) -> None:
        """Release the ONNX session."""
        ...


def run(context: Weighed) -> CheckResult:
    """Compare numbers of constants, not bytes: the CPU runtime widens float16 weights to float32 by itself."""
    context.close()  # its memory is needed for the optimiser's copy
    weights = count_weights(context.graph.proto)
    numbers = weights.elements + _packed(context)
    stored = checkpoint_size(context.reference, context.graph.layers).elements
    merged = merged_elements(
        context.reference,
        context.graph.layers,
        *(_declared(context.manifest, what) for what in ("form", "after", "core", "many")),
    )
    planned = stored + merged
    # The copy has every tensor for itself, also those of one place in the file (a quantised table, as rows and blocks).
    held = count_weights(context.graph.proto, apart=True).elements
    optimised = optimised_elements(context.graph, context.options.threads)
    reason = ""
    if numbers > _SLACK * (planned + weights.rope_elements) + _SMALL:
        reason = f"the graph holds {numbers} constants where the model folder has {stored}"
        reason += f" and merging was planned to add {merged}" if merged else ""
    elif optimised > _SLACK * held + _SMALL:
        reason = f"onnxruntime's optimiser turns {held} constants into {optimised}: it multiplies factors back together"
    metrics = {
        "constants": numbers,
        "planned_constants": planned,
        "merged_constants": merged,
        "optimised_constants": optimised,
        "weight_bytes": weights.nbytes,
    }
    return CheckResult(NAME, TITLE, not reason, reason, metrics=dict(metrics))


def _packed(context: Weighed) -> int:
    """What quantised matrices hold beyond the constants that codes and scales are: codes of 4 bits lie in pairs."""
    return sum(
        matrix.rows * matrix.columns - prod(matrix.codes.dims) - prod(matrix.scales.dims)
        for matrix in matrices_of(context.graph, context.manifest).values()
    )


def _declared(manifest: Mapping[str, Any], what: str) -> dict[str, str]:
    """Linear -> ``what`` the export chose for it, as its manifest declares; empty where nothing is declared.

    The manifest comes with the folder under test: what a form holds is counted anew from the model folder.
    """
    plan = manifest.get("plan")
    forms = plan.get("forms") if isinstance(plan, dict) else None
    if not isinstance(forms, dict):
        return {}
    found = {name: entry.get(what) for name, entry in forms.items() if isinstance(entry, dict)}
    return {name: value for name, value in found.items() if isinstance(value, str)}
