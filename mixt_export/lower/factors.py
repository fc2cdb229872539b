"""Lower a factorised linear in its planned form: a node of the `mixt` domain, or the matrix where that is the form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from mixt_export.lower.builder import MIXT_DOMAIN, Dim
from mixt_export.lower.functions import load_function
from mixt_export.lower.fused import fused_function, fused_node
from mixt_export.lower.mixture import mixt_node, weight_names, weight_shape, window_weight
from mixt_export.lower.network_function import Operand, function_for
from mixt_export.lower.pivot import pivot_weights
from mixt_export.lower.sparse import lower_sparse
from mixt_export.lower.weights import DTYPES
from mixt_export.network import FactorizedLinear
from mixt_export.plan import Form, MixtForm, Mixture, NetworkForm
from mixt_export.plan.merged import Merged, dense_weight, merge
from mixt_export.plan.pivot import PivotForm
from mixt_export.plan.windows import MAX_WINDOWS

if TYPE_CHECKING:
    from mixt_export.lower.linear import LinearContext  # which calls this module

Array = np.ndarray[Any, Any]
Load = Callable[[str], Array]


def lower_form(context: LinearContext, form: Form, factors: FactorizedLinear, x: ir.Value, node: str) -> ir.Value:
    """y (batch, seq, out) = factors(x) in ``form``, bias included; ``node`` names the node.

    Raises CheckpointError when a tensor is missing, NetworkError where no contraction order fits.
    """
    if form.dense:
        return _matrix(context, form, factors, x, node)
    if isinstance(form, MixtForm):
        if len(form.windows) <= MAX_WINDOWS:
            return _mixture(context, form, factors, x, node)
        stored = tuple(tuple((index,) for index in range(len(branch.cores))) for branch in factors.branches)
        return _network(context, stored, None, factors, x, node)
    lower = _pivot if isinstance(form, PivotForm) else _two_factors
    if factors.sparse is None:
        return lower(context, form, factors, x, node)
    y = lower(context, form, replace(factors, sparse=None), x, node)
    rest = lower_sparse(context, factors, x, f"{node}/sparse")
    dtype, shape = _type(context, factors)
    return context.builder.op("Add", [y, rest], name=f"{node}/add_sparse", dtype=dtype, shape=shape)


def _type(context: LinearContext, factors: FactorizedLinear) -> tuple[ir.DataType, list[Dim]]:
    return DTYPES[context.weights.dtype], ["batch", "seq", factors.out_features]


def _bias(context: LinearContext, factors: FactorizedLinear) -> list[ir.Value]:
    if factors.bias is None:
        return []
    context.weights.expect(factors.bias.name, (factors.out_features,))
    return [context.builder.initializer(context.weights.tensor(factors.bias.name))]


def _matrix(context: LinearContext, form: Form, factors: FactorizedLinear, x: ir.Value, node: str) -> ir.Value:
    """One product with the matrix rebuilt at export, sparse residual included."""
    builder, weights = context.builder, context.weights
    dtype, shape = _type(context, factors)
    features = (factors.in_features, factors.out_features)
    mixture = Mixture.of(factors) if isinstance(form, MixtForm) else None
    if isinstance(form, MixtForm) and mixture is not None:
        ((suffix, window),) = weight_names(form)
        name, make = f"{factors.name}.{suffix}", partial(window_weight, form, window, mixture)
    else:
        name, make = f"{factors.name}.dense", partial(dense_weight, factors)
    sources = [tensor.name for tensor in factors.tensors() if tensor != factors.bias]
    matrix = builder.initializer(weights.derived(name, features, sources, make))
    context.forms[factors.name] = "dense"
    y = builder.op("MatMul", [x, matrix], name=f"{node}/MatMul", dtype=dtype, shape=shape)
    bias = _bias(context, factors)
    return builder.op("Add", [y, *bias], name=f"{node}/Add", dtype=dtype, shape=shape) if bias else y


def _mixture(context: LinearContext, form: MixtForm, factors: FactorizedLinear, x: ir.Value, node: str) -> ir.Value:
    """A MixT in windows: one node with merged weights."""
    mixture = Mixture.of(factors)
    assert mixture is not None  # forms with windows are those of a mixture
    form = replace(form, bias=factors.bias is not None)
    values = [
        context.builder.initializer(
            context.weights.derived(
                f"{factors.name}.{suffix}",
                weight_shape(form, window),
                [term.tensor for term in mixture.terms[window.first : window.first + window.count]],
                partial(window_weight, form, window, mixture),
            )
        )
        for suffix, window in weight_names(form)
    ]
    inputs = [x, *values, *_bias(context, factors)]
    fused = fused_node(form, context.weights.dtype) if context.kernels else None
    if fused is not None:
        return _node(context, fused_function(fused.op_type), factors, inputs, node, fused.attributes)
    op_type, attributes = mixt_node(form)
    return _node(context, load_function(op_type), factors, inputs, node, attributes)


def _pivot(context: LinearContext, form: NetworkForm, factors: FactorizedLinear, x: ir.Value, node: str) -> ir.Value:
    """Pivot rows and what makes the others of them; the matrix itself where every row is a pivot."""
    assert isinstance(form, PivotForm)  # what chose this function
    if form.rank == form.out_features:
        return _matrix(context, form, factors, x, node)
    function = load_function("PivotLinear" if factors.bias is None else "PivotLinearBias")
    values = pivot_weights(context, form, factors)
    return _node(context, function, factors, [x, *values, *_bias(context, factors)], node, {})


def _two_factors(
    context: LinearContext, form: NetworkForm, factors: FactorizedLinear, x: ir.Value, node: str
) -> ir.Value:
    return _low_rank(context, form, factors, x, node) or _network(context, form.groups, form, factors, x, node)


def _low_rank(
    context: LinearContext, form: NetworkForm, factors: FactorizedLinear, x: ir.Value, node: str
) -> ir.Value | None:
    """U V with V (in, rank) and U (rank, out), each stored as the product needs it; None where it is anything else."""
    if form.name != "chain" or len(factors.branches) != 1 or context.einsum:
        return None
    (branch,) = factors.branches
    if len(branch.cores) != 2 or branch.scale != 1.0 or branch.padded:
        return None
    down, up = branch.cores
    (i, _), *more_in = branch.in_modes
    (o, _), *more_out = branch.out_modes
    if more_in or more_out or len(down.labels) != 2 or down.labels[0] != i or up.labels != (down.labels[1], o):
        return None
    values = [context.builder.initializer(context.weights.tensor(core.tensor.name)) for core in (down, up)]
    function = load_function("LowRankLinear" if factors.bias is None else "LowRankLinearBias")
    return _node(context, function, factors, [x, *values, *_bias(context, factors)], node, {})


def _network(
    context: LinearContext,
    groups: Sequence[Any],
    form: NetworkForm | None,
    factors: FactorizedLinear,
    x: ir.Value,
    node: str,
) -> ir.Value:
    """Any tensor network with some of its cores merged: a function made for its structure, activation first."""
    merged = merge(factors, groups)
    y = _fused(context, merged, factors, x, node)
    if y is not None:
        return y
    options = {} if form is None else {"left_from": form.left_from}
    made = function_for(
        merged.network,
        context.builder.opsets[""],
        orders=[tuple(range(len(branch.cores))) for branch in merged.network.branches],
        flat=context.flat,
        einsum_nodes=context.einsum,
        **options,
    )
    operands = made.operands if factors.bias is None else made.operands[:-1]
    values = [context.builder.initializer(_weight(context, merged, operand)) for operand in operands]
    function = ir.serde.deserialize_function(made.proto)
    return _node(context, function, factors, [x, *values, *_bias(context, factors)], node, {})


def _fused(
    context: LinearContext, merged: Merged, factors: FactorizedLinear, x: ir.Value, node: str
) -> ir.Value | None:
    """A tensor train as the node that a compiled kernel takes; None where there is no such kernel."""
    fused = fused_node(merged, context.weights.dtype) if context.kernels and not context.einsum else None
    if fused is None:
        return None
    weights = context.weights
    values = [
        context.builder.initializer(
            weights.viewed(tensor.name, tensor.shape)
            if tensor.stored
            else weights.derived(tensor.name, tensor.shape, tensor.sources, tensor.make)
        )
        for tensor in fused.tensors
    ]
    function = fused_function(fused.op_type)
    return _node(context, function, factors, [x, *values, *_bias(context, factors)], node, fused.attributes)


def _weight(context: LinearContext, merged: Merged, operand: Operand) -> ir.TensorProtocol:
    """``operand`` where it lies where it is stored as it is read, else in a layout of its own."""
    weights, source = context.weights, merged.sources.get(operand.tensor)
    if source is None and operand.stored:
        return weights.viewed(operand.tensor, operand.shape)
    axes = "".join(f"_{axis}" for axis in operand.perm)
    label = f"{operand.tensor}.axes{axes}.{'x'.join(map(str, operand.shape))}"
    if source is None and operand.perm == (1, 0) and tuple(operand.shape) == weights.shape(operand.tensor)[::-1]:
        return weights.transposed([operand.tensor], label)
    parts = [operand.tensor] if source is None else [part.tensor.name for part in source.parts]

    def make(load: Load) -> Array:
        values = load(operand.tensor).astype(np.float64) if source is None else source.make(load)
        return values.transpose(operand.perm).reshape(operand.shape)

    return weights.derived(label, operand.shape, parts, make)


def _node(
    context: LinearContext,
    function: ir.Function,
    factors: FactorizedLinear,
    inputs: Sequence[ir.Value],
    node: str,
    attributes: dict[str, Any],
) -> ir.Value:
    context.builder.function(function)
    context.forms[factors.name] = function.name
    dtype, shape = _type(context, factors)
    return context.builder.op(
        function.name, inputs, name=node, domain=MIXT_DOMAIN, dtype=dtype, shape=shape, **attributes
    )
