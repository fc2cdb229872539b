"""Weights of few bits in an export: which matrices, by which rounding, and what the manifest says of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from mixt_export.checkpoints import Checkpoint
from mixt_export.errors import UnsupportedError, UsageError
from mixt_export.lower import LoweredModel
from mixt_export.lower.opened import open_products
from mixt_export.lower.quantised import QuantisedMatrix, Rounded, find_matrices, quantise
from mixt_export.lower.smoothed import find_smoothing, with_integer_products
from mixt_export.passes.turn import pairs
from mixt_export.quantisation import Quantisation, nearest
from mixt_export.quantisation.cache import CacheScales, Int8Cache
from mixt_export.quantisation.layouts import layout_of
from mixt_export.quantisation.smoothing import Smoothing
from mixt_export.targets.registry import Target


@dataclass(frozen=True)
class QuantisedPlan:
    """The matrices of a graph that were quantised; ``rounded`` gives their blocks when the graph is written.

    ``smoothing``: of products with int8 activations; its factors are measured before the graph is written.
    """

    settings: Quantisation
    matrices: Mapping[str, QuantisedMatrix]
    rounded: Rounded
    smoothing: Smoothing | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all codes and scales."""
        return sum(matrix.nbytes for matrix in self.matrices.values())


@dataclass(frozen=True)
class CachePlan:
    """A cache of 8 bits; ``scales`` are measured before the graph is written."""

    settings: Int8Cache
    scales: CacheScales


def check_int8_cache(target: Target, dtype: str) -> None:
    """Raise UnsupportedError for a target or dtype without a cache of 8 bits."""
    if target.name != "ort" or dtype != "float32":
        raise UnsupportedError(
            f"--kv-cache int8: only ONNX Runtime's attention on the CPU has it (--target ort at float32), not --target "
            f"{target.name} at {dtype}; leave it out."
        )


def check_quantisation(target: Target, dtype: str, memory_budget: int | None, variants: str) -> None:
    """Raise UsageError for options that do not go with `--quantize`."""
    if target.name == "ort" and dtype != "float32":
        raise UsageError(
            f"--quantize --dtype {dtype}: on a CPU activations are float32 whatever the weights; leave the dtype out."
        )
    if memory_budget is not None:
        raise UsageError("--memory-budget counts weights before they are quantised; leave it out with --quantize.")
    if variants == "one":
        raise UsageError(
            "--quantize --variants one: the two forms of a linear would be rounded to two functions, one for prompts "
            "and one for their continuation; leave --variants out."
        )


def check_int8_activations(target: Target, dtype: str) -> None:
    """Raise UnsupportedError for a target or dtype without products of int8 by int8."""
    if target.name != "ort" or dtype != "float32":
        raise UnsupportedError(
            f"--activations int8: only ONNX Runtime's CPU has such products (--target ort at float32), not --target "
            f"{target.name} at {dtype}; leave it out."
        )


def quantised_plan(lowered: LoweredModel, target: Target, embedding: str, settings: Quantisation) -> QuantisedPlan:
    """Quantise ``lowered`` in place. Raises UsageError when no matrix of it is large enough."""
    layout = layout_of(target.dialect.name)
    settings = layout.settled(settings)
    if settings.int8_activations:
        open_products(lowered)
    found = find_matrices(lowered, settings, embedding, layout)
    if not found:
        raise UsageError(
            f"--quantize: no matrix of this model has {settings.min_elements} elements"
            + (
                f" and whole blocks of {settings.group} inputs; leave it out, or choose a smaller --group."
                if settings.group
                else "; leave it out."
            )
        )
    smoothing = find_smoothing(lowered, found) if settings.int8_activations else None
    if smoothing is not None:
        if not smoothing.groups:
            raise UnsupportedError(
                "--activations int8: no linear of this model reads a norm, an attention or a gate that could be scaled "
                "for it; leave it out."
            )
        found = with_integer_products(found, smoothing)
    rounded = Rounded(lambda matrix, values: nearest(values, matrix.bits, matrix.group, scale_dtype=matrix.scale_dtype))
    quantise(lowered, target.dialect, found, rounded)
    if smoothing is not None:
        for name in sorted(smoothing.names - found.keys()):
            lowered.weights.change(name, partial(smoothing.applied, name))
    return QuantisedPlan(settings, {name: matrix for name, (matrix, _) in found.items()}, rounded, smoothing)


def quantised_pairs(plan: QuantisedPlan | None, checkpoint: Checkpoint) -> list[str]:
    """Linears of ``checkpoint`` whose two factors both become integers, each as a matrix of its own."""
    if plan is None:
        return []
    single = {matrix.parts[0] for matrix in plan.matrices.values() if len(matrix.parts) == 1}
    return [
        name
        for name, pair in pairs(checkpoint.factors).items()
        if {pair.first.tensor.name, pair.second.tensor.name} <= single
    ]


def quantisation_entry(plan: QuantisedPlan, figures: Mapping[str, Any]) -> dict[str, Any]:
    """What the manifest says: settings, rounding and loss (``figures``), and of every matrix what is written."""
    return {
        "bits": plan.settings.bits,
        "head_bits": plan.settings.head_bits,
        "int8_for": list(plan.settings.int8_for),
        "group": plan.settings.group,
        "min_elements": plan.settings.min_elements,
        "bytes": plan.nbytes,
        **figures,
        "matrices": {matrix.name: _matrix_entry(plan, matrix) for matrix in plan.matrices.values()},
    }


def _matrix_entry(plan: QuantisedPlan, matrix: QuantisedMatrix) -> dict[str, Any]:
    return {
        "codes": matrix.codes_name,
        "scales": matrix.scales_name,
        "shape": [matrix.rows, matrix.columns],
        "transposed": matrix.transposed,
        "bits": matrix.bits,
        "group": matrix.group,
        "bytes": matrix.nbytes,
        "parts": list(matrix.parts),
        "flipped": matrix.flipped,
        **({"activations": matrix.activations} if matrix.activations else {}),
        **plan.rounded.errors.get(matrix.name, {}),
    }
