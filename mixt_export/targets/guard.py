"""No pass may multiply factors back together: what a graph holds is held against what was planned."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import onnx_ir as ir

from mixt_export.errors import MixtError
from mixt_export.lower import LoweredModel
from mixt_export.lower.weights import itemsize
from mixt_export.plan import FormPlan
from mixt_export.plan.pivot import PivotForm

#: Bytes of masks, shapes and scalars that no checkpoint holds.
_SLACK = 1 << 20


def guard_weights(lowered: LoweredModel, forms: FormPlan, weight_bytes: int) -> None:
    """Raise MixtError (an internal error) when the graph holds more weights than planned, as a whole or in factors.

    As a whole: the checkpoint's parameters, with what the planned forms hold in place of the cores, the rotary tables
    and small constants. In factors: initializers named after factorised linears or their cores, biases apart, hold at
    most the planned numbers; sparse residuals besides their int32 indices and padding (see `lower.sparse`), pivot rows
    besides the int32 order of the outputs.
    """
    weights = lowered.weights
    factors = weights.checkpoint.factors
    item = itemsize(weights.dtype)
    elsewhere = {ref.name for name, linear in factors.items() if name not in forms.choices for ref in linear.tensors()}
    cores = sum(size for name, size in forms.cores().items() if name not in elsewhere)
    stored = sum(prod(tensor.ref.shape) for tensor in weights.checkpoint.store.values())
    indices = _sparse_bytes(forms, item) + _order_bytes(forms)
    planned = (stored - cores + forms.planned_elements) * item + indices
    tables = sum(entry.nbytes for entry in weights.streamed if entry.name.startswith("/rotary/"))
    if weight_bytes > planned + tables + _SLACK:
        raise _grown(f"the graph holds {weight_bytes} bytes of weights", planned + tables)
    held = sum(_factor_bytes(lowered.model, forms))
    allowed = forms.planned_elements * item + indices
    if held > allowed:
        raise _grown(f"the graph holds {held} bytes of factors", allowed)


def _grown(found: str, planned: int) -> MixtError:
    return MixtError(f"{found}, planned were {planned}: the lowering rebuilt dense weights. Please report this.")


def _sparse_bytes(forms: FormPlan, item: int) -> int:
    """Indices and padding of the sparse residuals that are executed as such."""
    linears = [choice.linear for choice in forms.choices.values() if not choice.form.dense]
    return sum(
        linear.sparse.nnz * (item + 2 * 4) + linear.out_features * 4 + 2 * item
        for linear in linears
        if linear.sparse is not None
    )


def _order_bytes(forms: FormPlan) -> int:
    """Where pivot rows and the others belong: one int32 an output."""
    choices = forms.choices.values()
    return sum(4 * choice.form.out_features for choice in choices if isinstance(choice.form, PivotForm))


def _factor_bytes(model: ir.Model, forms: FormPlan) -> Iterator[int]:
    linears = [choice.linear for choice in forms.choices.values()]
    roots = {linear.name for linear in linears} | {core.name for linear in linears for core in linear.core_tensors()}
    biases = {linear.bias.name for linear in linears if linear.bias is not None}
    seen = set()
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or name in biases:
            continue
        parts = name.split(".")
        place = (getattr(tensor, "location", name), getattr(tensor, "offset", None))
        if place not in seen and any(".".join(parts[:count]) in roots for count in range(1, len(parts) + 1)):
            seen.add(place)
            yield tensor.nbytes
