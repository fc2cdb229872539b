"""Multiply-adds of a model per token, in each form in which its factors can be executed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from mixt_export.accounting.forms import Cost, dense_cost, forms_of
from mixt_export.accounting.methods import Variant
from mixt_export.families.wiring import Decoder, Linear, Mlp, MoeMlp
from mixt_export.network import FactorizedLinear

#: A backward pass multiplies twice per product of the forward pass: for the input's and for the weight's gradient.
TRAINING_FACTOR = 3


@dataclass(frozen=True)
class FormCosts:
    """A model with every replaced linear in one form. ``runs``: it can be executed; False for mere counts.

    ``linears``: name -> cost of every linear of the blocks; one that is not replaced, or lacks the form, is dense. An
    expert's multiply-adds are those of an average token: the share of the experts that it chooses.
    ``head``: multiply-adds per token of the output head.
    """

    linears: Mapping[str, Cost]
    head: int
    runs: bool

    @property
    def macs(self) -> int:
        """Multiply-adds per token of all linears and the head; attention scores are apart."""
        return sum(cost.macs for cost in self.linears.values()) + self.head

    @property
    def weights(self) -> int:
        """Numbers that the linears of the blocks hold, without biases."""
        return sum(cost.weights for cost in self.linears.values())

    def of(self, linears: tuple[Linear, ...]) -> int:
        """Multiply-adds per token of some of the linears."""
        return sum(self.linears[linear.name].macs for linear in linears)


def form_costs(decoder: Decoder, variant: Variant) -> dict[str, FormCosts]:
    """Form -> costs of ``decoder`` with the linears of ``variant`` replaced; the dense model has ``dense`` alone."""
    alike: dict[object, dict[str, Cost]] = {}
    found = {}
    for name, factors in variant.factors.items():
        sizes = _sizes(factors)
        if sizes not in alike:
            alike[sizes] = forms_of(factors)
        found[name] = alike[sizes]
    names = list(dict.fromkeys(form for costs in found.values() for form in costs)) or ["dense"]
    # What can be executed comes first, dense last of it; then mere counts.
    runs = {form: all(costs[form].runs for costs in found.values() if form in costs) for form in names}
    names.sort(key=lambda form: (not runs[form], form == "dense"))
    return {form: _in_form(decoder, found, form, runs[form]) for form in names}


def attention_macs(decoder: Decoder, positions: int) -> int:
    """Multiply-adds of a token that attends over ``positions``: scores and weighted values, all blocks."""
    return 2 * len(decoder.blocks) * decoder.heads * decoder.head_dim * positions


def _sizes(linear: FactorizedLinear) -> object:
    """Equal for linears that differ in names only, as the same type of different blocks."""
    branches = tuple(
        (branch.in_modes, branch.out_modes, branch.padded, tuple(core.modes() for core in branch.cores))
        for branch in linear.branches
    )
    return linear.in_features, linear.out_features, branches


def _chosen(cost: Cost, mlp: Mlp) -> Cost:
    """``cost`` per token of an MLP's linear: of an expert, in the share of experts that a token chooses."""
    if not isinstance(mlp, MoeMlp):
        return cost
    return replace(cost, macs=cost.macs * mlp.top_k // len(mlp.experts))


def _in_form(decoder: Decoder, found: Mapping[str, Mapping[str, Cost]], form: str, runs: bool) -> FormCosts:
    linears = {}
    for block in decoder.blocks:
        for linear in block.linears:
            cost = found.get(linear.name, {}).get(form) or dense_cost(linear.in_features, linear.out_features)
            linears[linear.name] = _chosen(cost, block.mlp) if linear.name.startswith(f"{block.prefix}.mlp.") else cost
    return FormCosts(linears, decoder.vocab_size * decoder.hidden_size, runs)
