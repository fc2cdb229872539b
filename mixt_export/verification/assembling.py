"""Make the report of a verification from what its checks found; decoders and encoders alike."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from mixt_export.verification.gate import Gate
from mixt_export.verification.graph import ExportedGraph
from mixt_export.verification.layers import LayerErrors
from mixt_export.verification.memory.measure import MemoryReport
from mixt_export.verification.options import VerifyOptions
from mixt_export.verification.report import LayerError, Report
from mixt_export.verification.result import CheckResult

_PACKAGES = ("onnxruntime", "onnx", "torch", "transformers", "numpy")


class Verified(Protocol):
    """What a report needs of a verification that has run."""

    exported: Path
    reference: Path
    options: VerifyOptions
    graph: ExportedGraph
    layers: LayerErrors


def assemble(
    context: Verified,
    gate: Gate,
    results: list[CheckResult],
    layer: str,
    began: float,
    *,
    memory: MemoryReport | None = None,
    notes: Sequence[str] = (),
) -> Report:
    """The report; ``layer`` names a block by its index as in "model.layers.{}", ``began`` is a time.monotonic().

    Written into the exported folder unless the options say otherwise.
    """
    from mixt_export import __version__

    errors = context.layers.values()  # none where the runtime refused to run
    costs: Sequence[float | None] = gate.cost.layers[: len(errors)] if gate.cost else [None] * len(errors)
    thresholds = gate.layers[: len(errors)]
    report = Report(
        tool_version=__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        exported=str(context.exported),
        reference=str(context.reference),
        dialect=context.graph.dialect,
        dtype=context.graph.dtype,
        tolerance=gate.tolerance,
        tolerance_origin=gate.origin,
        minimum_tolerance=minimum_tolerance(results, gate.tolerance),
        checks=results,
        layers=[
            LayerError(layer.format(index), error, threshold, cost)
            for index, (error, threshold, cost) in enumerate(zip(errors, thresholds, costs, strict=True))
        ],
        dtype_cost=gate.cost,
        memory=memory,
        versions={name: importlib.metadata.version(name) for name in _PACKAGES},
        options={item.name: getattr(context.options, item.name) for item in dataclasses.fields(context.options)},
        notes=list(notes),
        seconds=time.monotonic() - began,
    )
    if context.options.write:
        report.write(context.exported)
    return report


def minimum_tolerance(results: list[CheckResult], asked: float) -> float | None:
    """The largest tolerance that any check needed; None when one had NaN, Inf or could not run.

    A check that passed by a bar of its own, wider than what was ``asked``, asks for nothing.
    """
    compared = [result for result in results if "tolerance" in result.metrics]
    own = [result for result in compared if result.passed and _number(result, "tolerance") > asked]
    numbers = [_number(result, "needed_tolerance") for result in compared if result not in own]
    crashed = any(not result.metrics for result in results)
    return max(numbers) if numbers and not crashed and all(map(math.isfinite, numbers)) else None


def _number(result: CheckResult, key: str) -> float:
    value = result.metrics.get(key)
    return float(value) if isinstance(value, int | float) else math.inf
