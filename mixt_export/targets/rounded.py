"""Write an export whose weights or cache are rounded: what is measured before, and what the manifest says of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixt_export.checkpoints import open_checkpoint
from mixt_export.checkpoints.strictjson import load_object
from mixt_export.lower.weights import itemsize
from mixt_export.progress import Progress
from mixt_export.quantisation.smoothing import FILE as SMOOTHING
from mixt_export.quantisation.smoothing import write_factors
from mixt_export.targets.files import facts, write_json
from mixt_export.targets.manifest import FILE
from mixt_export.targets.quantise import quantisation_entry, quantised_pairs

if TYPE_CHECKING:
    from mixt_export.targets.export import ExportPlan


def as_floats(plan: ExportPlan, variants: str) -> dict[str, Any]:
    """Options of plan_export for the graph of ``plan`` in float32, with the same matrices under the same names.

    A TensorRT graph is that of the portable dialect there, whose attention is one node, in the forms of its board.
    """
    found: dict[str, Any] = {"dtype": "float32", "variants": "none" if variants == "auto" else variants}
    if plan.trt is not None:
        dtype = plan.lowered.weights.dtype
        found |= {"target": "onnx", "trt": None, "forms_at": dtype, "constants": plan.trt.board.gpu(itemsize(dtype))}
    return found


def write_rounded(
    plan: ExportPlan, floats: ExportPlan, source: Path, folder: Path, write: Callable[[], bool], progress: Progress
) -> bool:
    """``write`` the folder behind calibration, then add to its manifest what rounding costs; what ``write`` returns.

    ``floats``: the same plan with float32 weights and values. Raises UsageError where text is needed and there is none.
    """
    from mixt_export.targets.calibrate import (
        FloatGraph,
        calibrate_cache,
        calibrate_plan,
        calibrate_smoothing,
        measured_loss,
        why_nearest,
    )

    plain, quantised, cache = FloatGraph(floats), plan.quantised, plan.cache
    graph, smoothing = plain, None if quantised is None else quantised.smoothing
    if quantised is not None and smoothing is not None:
        calibrate_smoothing(plain, smoothing, source, quantised.settings.texts, progress)
        graph = FloatGraph(floats, smoothing)
    if cache is not None:
        calibrate_cache(graph, cache.scales, source, cache.settings.texts, progress)
    why_not = "" if quantised is None else why_nearest(quantised, source)
    with ExitStack() as stack:
        if quantised is not None:
            quantised.rounded.read = graph.matrix
            if why_not:
                progress.note(f"weights are rounded to nearest: {why_not}")
            else:
                texts = quantised.settings.texts
                stack.enter_context(calibrate_plan(graph, quantised, source, texts, folder, progress))
        linked = write()
    asked = [each.settings.measure for each in (quantised, cache) if each is not None]
    loss = measured_loss(plain, folder, progress) if all(asked) else None
    measured = {} if loss is None else {"loss": loss}
    manifest = load_object(folder / FILE)
    if quantised is not None:
        figures = {"rounding": "nearest" if why_not else "calibrated", **measured}
        manifest["quantisation"] = quantisation_entry(quantised, figures)
        if smoothing is not None:
            rows = {name: matrix.rows for name, matrix in quantised.matrices.items()}
            write_factors(smoothing, rows, folder / SMOOTHING)
            manifest["files"][SMOOTHING] = facts(folder / SMOOTHING)
        if "turn" in plan.passes:
            manifest["quantisation"]["turned"] = _turned(plan, source, folder, manifest)
    else:
        manifest["kv"] |= measured
    write_json(folder / FILE, manifest)
    return linked


def _turned(plan: ExportPlan, source: Path, folder: Path, manifest: dict[str, Any]) -> dict[str, float]:
    """How far the products of turned factors are from those of the model folder ``source``, by linear."""
    from mixt_export.verification.graph import open_graph
    from mixt_export.verification.quantised import matrices_of
    from mixt_export.verification.turned import product_error, turned_pairs

    checkpoint = open_checkpoint(source)
    matrices = matrices_of(open_graph(folder), manifest)
    found = turned_pairs(quantised_pairs(plan.quantised, plan.checkpoint), matrices, checkpoint)
    return {name: product_error(*pair, checkpoint) for name, pair in found.items()}
