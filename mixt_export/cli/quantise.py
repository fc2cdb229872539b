"""What `mixt export --quantize` takes and says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from mixt_export.quantisation import Quantisation
    from mixt_export.targets import ExportPlan

#: Argument -> option, where they differ in more than dashes.
_OPTIONS = {"head": "quantize-head", "texts": "calib", "measure": "no-loss", "int8_for": "int8-for"}


def quantisation_from(
    kind: str | None, texts: list[Path] | None, int8_for: list[str] | None, **given: Any
) -> Quantisation | None:
    """What --quantize and the options beside it ask for; UsageError for one of them without it."""
    from mixt_export.errors import UsageError
    from mixt_export.quantisation import Quantisation

    if texts:
        given["texts"] = tuple(texts)
    if int8_for:
        given["int8_for"] = tuple(int8_for)
    asked = {name: value for name, value in given.items() if value is not None}
    if kind is not None:
        return Quantisation.named(kind, **asked)
    for name in asked:
        raise UsageError(
            f"--{_OPTIONS.get(name, name)} is an option of --quantize; add --quantize int8 or int4, or leave it out."
        )
    return None


def describe_quantised(plan: ExportPlan, manifest: dict[str, Any] | None = None) -> None:
    """How many matrices became integers, and what that cost where it was measured."""
    from mixt_export.lower.weights import itemsize

    quantised = plan.quantised
    if quantised is None:
        _hint(plan)
        return
    settings, matrices = quantised.settings, quantised.matrices.values()
    floats = itemsize(plan.lowered.weights.dtype) * sum(matrix.rows * matrix.columns for matrix in matrices)
    wide = sum(matrix.bits == 8 and not matrix.embedding for matrix in matrices) if settings.bits < 8 else 0
    apart = f"; {wide} matrices int8, see --int8-for" if wide else ""
    blocks = "with a scale for each output" if settings.bits == 8 and plan.trt else f"in groups of {settings.group}"
    table = plan.lowered.weights.dtype if settings.head_bits is None else f"int{settings.head_bits}"
    typer.echo(
        f"int{settings.bits} weights {blocks} (head and embedding {table}{apart}): "
        f"{len(matrices)} matrices, {floats / 1e6:.1f} → {quantised.nbytes / 1e6:.1f} MB"
    )
    loss = (manifest or {}).get("quantisation", {}).get("loss")
    if loss is not None:
        before, after = loss["perplexity_before"], loss["perplexity"]
        typer.echo(
            f"quantisation costs: perplexity {before:.2f} → {after:.2f} ({after / before - 1:+.1%}), "
            f"KL {loss['kl']:.4f} nats, on {loss['tokens']} tokens of the evaluation texts"
        )


def _hint(plan: ExportPlan) -> None:
    """What a 16-bit checkpoint costs on a CPU, which has no products of 16-bit weights (docs/quantisation.md)."""
    narrow = {stored.ref.dtype for stored in plan.checkpoint.store.values()} & {"float16", "bfloat16"}
    if narrow and plan.target.name == "ort" and plan.lowered.weights.dtype == "float32":
        typer.echo(
            f"the weights are {' and '.join(sorted(narrow))}, which ONNX Runtime's CPU does not multiply by: written "
            "as float32, exactly, at twice the size; --quantize int8 takes about a third of that and decodes faster"
        )
