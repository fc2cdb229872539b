"""Lower one linear: factors to one node of the `mixt` domain, dense to the matrix product the dialect prefers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from mixt_export.errors import CheckpointError
from mixt_export.families.wiring import Linear
from mixt_export.lower.builder import MICROSOFT_DOMAIN, Dim, GraphBuilder
from mixt_export.lower.factors import lower_form
from mixt_export.lower.variants import lower_variants
from mixt_export.lower.weights import DTYPES, Weights
from mixt_export.network import FactorizedLinear
from mixt_export.plan import Choice, Form, choose_forms
from mixt_export.plan.sharing import Sharing


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
    """Factorised linears -> the executable form that was planned."""
    einsum: bool = False
    """Networks are one Einsum for each core, to be read."""
    flat: bool = False
    """Batch and positions are one axis inside functions of networks, see network_function.function_for."""
    kernels: bool = False
    """Linears that a compiled kernel serves are one node, see fused.fused_node."""
    sharing: Sharing = field(default_factory=Sharing)
    """First steps that were planned once for several linears."""
    many: Mapping[str, Choice] = field(default_factory=dict)
    """Linears -> the second form that was planned for runs of many tokens."""
    few_tokens: ir.Value | None = None
    """Whether this run is one of few tokens, a bool scalar, where there are second forms."""
    computed: dict[tuple[str, ir.Value], ir.Value] = field(default_factory=dict)
    """Filled in: name of such a step and what it read -> its output."""


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
        and not any(linear.stored_transposed for linear in linears)
        and context.weights.in_place([f"{linear.name}.weight" for linear in linears])
    )


def lower_dense(
    context: LinearContext, linears: Sequence[Linear], x: ir.Value, node: str, *, biased: bool = True
) -> ir.Value:
    """y = [W1; W2; …] x + bias for dense linears that read the same input, outputs side by side."""
    weights, builder = context.weights, context.builder
    names = [f"{linear.name}.weight" for linear in linears]
    for linear, name in zip(linears, names, strict=True):
        weights.expect(name, linear.stored_shape)
        context.forms[linear.name] = "dense"
    stem = node.rsplit("/", 1)[-1]
    label = names[0] if len(names) == 1 else f"{linears[0].name.rsplit('.', 1)[0]}.{stem}.weight"
    out = sum(linear.out_features for linear in linears)
    shape: list[Dim] = ["batch", "seq", out]
    dtype = DTYPES[weights.dtype]
    name = f"{node}/MatMul"
    if linears[0].stored_transposed:  # what MatMul wants; such a linear comes alone
        w = builder.initializer(weights.tensor(names[0]))
        y = builder.op("MatMul", [x, w], name=name, dtype=dtype, shape=shape)
    elif context.fused_transpose and weights.in_place(names):
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
    choice = context.choices.get(linear.name) or choose_forms([factors]).choices[linear.name]
    head = context.sharing.reads.get(linear.name)
    if head is not None:
        x = _head(context, head, x, node.rpartition("/")[0])
        factors = replace(choice.linear, bias=factors.bias)
    return _in_forms(context, linear.name, choice.form, factors, x, node)


def _in_forms(
    context: LinearContext, name: str, form: Form, factors: FactorizedLinear, x: ir.Value, node: str
) -> ir.Value:
    """``factors`` in ``form``, or in the one of its two forms that suits the number of tokens."""
    other = context.many.get(name)
    if other is None:
        return lower_form(context, form, factors, x, node)
    return lower_variants(context, form, other.form, factors, x, node)


def _head(context: LinearContext, name: str, x: ir.Value, parent: str) -> ir.Value:
    """The output of a shared first step on the input ``x``, computed when first asked for; nodes below ``parent``."""
    if (name, x) not in context.computed:
        before = context.sharing.reads.get(name)
        inner = x if before is None else _head(context, before, x, parent)
        choice = context.choices[name]
        node = f"{parent}/{'.'.join(name.split('.')[-2:])}"  # who shares it, and the core
        again = sum(known == name for known, _ in context.computed)
        node = f"{node}_{again}" if again else node
        context.computed[name, x] = _in_forms(context, name, choice.form, choice.linear, inner, node)
    return context.computed[name, x]
