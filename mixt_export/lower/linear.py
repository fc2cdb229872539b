"""Lower one linear: factors to one node of the `mixt` domain, dense to the matrix product the dialect prefers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import onnx_ir as ir

from mixt_export.errors import CheckpointError, UnsupportedError
from mixt_export.families.wiring import Linear
from mixt_export.lower.builder import MICROSOFT_DOMAIN, MIXT_DOMAIN, Dim, GraphBuilder
from mixt_export.lower.functions import load_function
from mixt_export.lower.mixture import mixt_node, weight_names, weight_shape, window_weight
from mixt_export.lower.network_function import function_for
from mixt_export.lower.weights import DTYPES, Weights
from mixt_export.network import FactorizedLinear
from mixt_export.plan import Choice
from mixt_export.plan.forms import MAX_WINDOWS


@dataclass
class LinearContext:
    """What lowering a linear needs to know."""

    builder: GraphBuilder
    weights: Weights
    fused_transpose: bool
    """The dialect multiplies by a stored (out, in) matrix without a copy (com.microsoft FusedMatMul, float32)."""
    forms: dict[str, str]
    """Filled in: linear name -> the form it was lowered to, for the report."""
    choices: Mapping[str, Choice] = field(default_factory=dict)
    """MixT linears -> the executable form that was planned; others take the form their structure has."""


def lower_linear(context: LinearContext, linear: Linear, x: ir.Value, node: str, *, biased: bool = True) -> ir.Value:
    """y (batch, seq, out) = linear(x); ``node`` is the node's name, e.g. ``/model/layers.0/mlp/up_proj``.

    Without ``biased`` the bias, if there is one, is left for the caller to add.
    """
    factors = context.weights.checkpoint.factors.get(linear.name)
    if factors is not None:
        return _factorized(context, linear, factors, x, node, biased)
    return lower_dense(context, [linear], x, node, biased=biased)


def is_dense(context: LinearContext, linears: Sequence[Linear]) -> bool:
    """Whether none of ``linears`` is factorised."""
    return not any(linear.name in context.weights.checkpoint.factors for linear in linears)


def packs_in_place(context: LinearContext, linears: Sequence[Linear]) -> bool:
    """Whether dense ``linears`` over one input can be one matrix product without copying a weight."""
    biases = {linear.bias for linear in linears}
    return (
        is_dense(context, linears)
        and len(biases) == 1
        and context.fused_transpose
        and context.weights.in_place([f"{linear.name}.weight" for linear in linears])
    )


def lower_dense(
    context: LinearContext, linears: Sequence[Linear], x: ir.Value, node: str, *, biased: bool = True
) -> ir.Value:
    """y = [W1; W2; …] x + bias for dense linears that read the same input, outputs side by side."""
    weights, builder = context.weights, context.builder
    names = [f"{linear.name}.weight" for linear in linears]
    for linear, name in zip(linears, names, strict=True):
        weights.expect(name, (linear.out_features, linear.in_features))
        context.forms[linear.name] = "dense"
    stem = node.rsplit("/", 1)[-1]
    label = names[0] if len(names) == 1 else f"{linears[0].name.rsplit('.', 1)[0]}.{stem}.weight"
    out = sum(linear.out_features for linear in linears)
    shape: list[Dim] = ["batch", "seq", out]
    dtype = DTYPES[weights.dtype]
    name = f"{node}/MatMul"
    if context.fused_transpose and weights.in_place(names):
        w = builder.initializer(weights.refer(names, label))
        y = builder.op("FusedMatMul", [x, w], name=name, dtype=dtype, shape=shape, domain=MICROSOFT_DOMAIN, transB=1)
    else:
        w = builder.initializer(weights.transposed(names, label))
        y = builder.op("MatMul", [x, w], name=name, dtype=dtype, shape=shape)
    if not (biased and linears[0].bias):
        return y
    biases = [f"{linear.name}.bias" for linear in linears]
    for linear, bias in zip(linears, biases, strict=True):
        weights.expect(bias, (linear.out_features,))
    b = builder.initializer(weights.stacked(biases, label.removesuffix("weight") + "bias"))
    return builder.op("Add", [y, b], name=f"{node}/Add", dtype=dtype, shape=shape)


def _factorized(
    context: LinearContext, linear: Linear, factors: FactorizedLinear, x: ir.Value, node: str, biased: bool
) -> ir.Value:
    expected = (linear.in_features, linear.out_features, linear.bias)
    found = (factors.in_features, factors.out_features, factors.bias is not None)
    if expected != found:
        raise CheckpointError(
            f"{linear.name}: config.json wants (in, out, bias) = {expected}, the factors are {found}; "
            "the factors do not belong to this config.json."
        )
    if not biased:
        factors = replace(factors, bias=None)
    choice = context.choices.get(linear.name)
    if choice is not None and len(choice.form.windows) <= MAX_WINDOWS:
        return _mixture(context, choice, factors, x, node)
    for recognise in FORMS:
        lowered = recognise(factors, context.builder.opsets[""])
        if lowered is not None:
            break
    else:
        raise UnsupportedError(f"{linear.name}: factors of method {factors.method!r} cannot be lowered to ONNX.")
    function, tensors = lowered
    builder, weights = context.builder, context.weights
    builder.function(function)
    values = [builder.initializer(weights.tensor(tensor)) for tensor in tensors]
    context.forms[linear.name] = function.name
    return builder.op(
        function.name,
        [x, *values],
        name=node,
        domain=MIXT_DOMAIN,
        dtype=DTYPES[weights.dtype],
        shape=["batch", "seq", linear.out_features],
    )


def _mixture(context: LinearContext, choice: Choice, factors: FactorizedLinear, x: ir.Value, node: str) -> ir.Value:
    """A MixT in its planned form: one node with merged weights, or a plain product where that form is dense."""
    builder, weights, mixture = context.builder, context.weights, choice.mixture
    form = replace(choice.form, bias=factors.bias is not None)
    dtype = DTYPES[weights.dtype]
    shape: list[Dim] = ["batch", "seq", factors.out_features]
    values = [
        builder.initializer(
            weights.derived(
                f"{factors.name}.{suffix}",
                weight_shape(form, window),
                [term.tensor for term in mixture.terms[window.first : window.first + window.count]],
                partial(window_weight, form, window, mixture),
            )
        )
        for suffix, window in weight_names(form)
    ]
    if factors.bias is not None:
        weights.expect(factors.bias.name, (factors.out_features,))
        values.append(builder.initializer(weights.tensor(factors.bias.name)))
    if form.dense:
        context.forms[factors.name] = "dense"
        y = builder.op("MatMul", [x, values[0]], name=f"{node}/MatMul", dtype=dtype, shape=shape)
        if factors.bias is None:
            return y
        return builder.op("Add", [y, values[1]], name=f"{node}/Add", dtype=dtype, shape=shape)
    op_type, attributes = mixt_node(form)
    builder.function(load_function(op_type))
    context.forms[factors.name] = op_type
    return builder.op(op_type, [x, *values], name=node, domain=MIXT_DOMAIN, dtype=dtype, shape=shape, **attributes)


Form = tuple[ir.Function, tuple[str, ...]]


def _low_rank(factors: FactorizedLinear, _opset: int) -> Form | None:
    """U V with V (in, rank) and U (rank, out), each stored as the product needs it."""
    if len(factors.branches) != 1 or factors.sparse is not None:
        return None
    (branch,) = factors.branches
    if len(branch.cores) != 2 or branch.scale != 1.0 or branch.padded:
        return None
    down, up = branch.cores
    (i, _), *more_in = branch.in_modes
    (o, _), *more_out = branch.out_modes
    if more_in or more_out or len(down.labels) != 2 or down.labels[0] != i or up.labels != (down.labels[1], o):
        return None
    tensors = (down.tensor.name, up.tensor.name)
    if factors.bias is None:
        return load_function("LowRankLinear"), tensors
    return load_function("LowRankLinearBias"), (*tensors, factors.bias.name)


def _network(factors: FactorizedLinear, opset: int) -> Form | None:
    """Any other tensor network: a function made for its structure, activation first."""
    made = function_for(factors, opset)
    return ir.serde.deserialize_function(made.proto), made.tensors


#: Tried in order with the graph's opset; the first that recognises the structure lowers it.
FORMS: tuple[Callable[[FactorizedLinear, int], Form | None], ...] = (_low_rank, _network)
