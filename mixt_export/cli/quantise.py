"""What `mixt export --quantize` takes and says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from mixt_export.quantisation import Quantisation
    from mixt_export.quantisation.cache import Int8Cache
    from mixt_export.targets import ExportPlan
    from mixt_export.targets.quantise import QuantisedPlan

#: Argument -> option, where they differ in more than dashes.
_OPTIONS = {"head": "quantize-head", "texts": "calib", "measure": "no-loss", "int8_for": "int8-for"}


def quantisation_from(
    kind: str | None, texts: list[Path] | None, int8_for: list[str] | None, *, cache: bool = False, **given: Any
) -> Quantisation | None:
    """What --quantize and the options beside it ask for; UsageError for one of them without it.

    ``cache``: --kv-cache was given, which takes texts and measures a loss by itself.
    """
    from mixt_export.errors import UsageError
    from mixt_export.quantisation import Quantisation

    if texts:
        given["texts"] = tuple(texts)
    if int8_for:
        given["int8_for"] = tuple(int8_for)
    asked = {name: value for name, value in given.items() if value is not None}
    if kind is not None:
        return Quantisation.named(kind, **asked)
    for name in [name for name in asked if not (cache and name in ("texts", "measure"))]:
        raise UsageError(
            f"--{_OPTIONS.get(name, name)} is an option of --quantize; add --quantize int8 or int4, or leave it out."
        )
    return None


def int8_cache_from(kind: str | None, texts: list[Path] | None, no_loss: bool) -> Int8Cache | None:
    """What --kv-cache asks for; UsageError for another than int8."""
    from mixt_export.errors import UsageError
    from mixt_export.quantisation.cache import Int8Cache

    if kind is None:
        return None
    if kind != "int8":
        raise UsageError(f"--kv-cache {kind}: not a kind of cache of this version; choose int8, or leave it out.")
    return Int8Cache(tuple(texts or ()), not no_loss)


def describe_quantised(plan: ExportPlan, manifest: dict[str, Any] | None = None) -> None:
    """How many matrices became integers, and what that cost where it was measured."""
    from mixt_export.lower.weights import itemsize

    if plan.quantised is None:
        _hint(plan)
    else:
        typer.echo(_weights(plan, plan.quantised))
    if plan.cache is not None:
        before = plan.decoder.kv_bytes_per_token(itemsize(plan.lowered.weights.dtype))
        typer.echo(f"int8 cache of keys and values: {before:,} → {plan.kv_bytes_per_token:,} bytes per token")
    written = manifest or {}
    loss = written.get("quantisation", written.get("kv", {})).get("loss")
    if loss is not None:
        before, after = loss["perplexity_before"], loss["perplexity"]
        typer.echo(
            f"quantisation costs: perplexity {before:.2f} → {after:.2f} ({after / before - 1:+.1%}), "
            f"KL {loss['kl']:.4f} nats, on {loss['tokens']} tokens of the evaluation texts"
        )


def _weights(plan: ExportPlan, quantised: QuantisedPlan) -> str:
    from mixt_export.lower.weights import itemsize

    settings, matrices, dtype = quantised.settings, quantised.matrices.values(), plan.lowered.weights.dtype
    floats = itemsize(dtype) * sum(matrix.rows * matrix.columns for matrix in matrices)
    wide = sum(matrix.bits == 8 and not matrix.embedding for matrix in matrices) if settings.bits < 8 else 0
    apart = f"; {wide} matrices int8, see --int8-for" if wide else ""
    blocks = f"in groups of {settings.group}" if settings.group else "with a scale for each output"
    integer = sum(bool(matrix.activations) for matrix in matrices)
    linears = sum(not matrix.embedding for matrix in matrices)
    rest = f", {linears - integer} in blocks" if linears > integer else ""
    blocks = f"with int8 activations in {integer} of {linears} products{rest}" if integer else blocks
    table = dtype if settings.head_bits is None else f"int{settings.head_bits}"
    return (
        f"int{settings.bits} weights {blocks} (head and embedding {table}{apart}): "
        f"{len(matrices)} matrices, {floats / 1e6:.1f} → {quantised.nbytes / 1e6:.1f} MB"
    )


def _hint(plan: ExportPlan) -> None:
    """What a 16-bit checkpoint costs on a CPU, which has no products of 16-bit weights (docs/quantisation.md)."""
    narrow = {stored.ref.dtype for stored in plan.checkpoint.store.values()} & {"float16", "bfloat16"}
    if narrow and plan.target.name == "ort" and plan.lowered.weights.dtype == "float32":
        typer.echo(
            f"the weights are {' and '.join(sorted(narrow))}, which ONNX Runtime's CPU does not multiply by: written "
            "as float32, exactly, at twice the size; --quantize int8 takes about a third of that and decodes faster"
        )
