"""The choice for every structure: budgets kept, nothing slower than dense where it fits, nothing executed naively."""

from __future__ import annotations

import re

import pytest

from mixt_export.errors import ResourceError, UsageError
from mixt_export.network import FactorizedLinear, build, macs
from mixt_export.plan import Budget, FormPlan, choose_forms, forms_of, seconds
from mixt_export.plan.networks import NAIVE
from mixt_export.plan.objectives import OBJECTIVES, SLOWER

PLENTY = Budget(10**12, 0, 4)
GUARDED = [name for name, objective in OBJECTIVES.items() if objective.guarded]


def model(layers: int = 2) -> list[FactorizedLinear]:
    """One linear of each structure per layer, with different answers at 1 and at 128 rows."""
    return [
        linear
        for layer in range(layers)
        for linear in (
            build.tensor_train(f"layers.{layer}.train", (8, 8, 9), (8, 9, 8), (32, 32)),
            build.tensor_train(f"layers.{layer}.wide", (16, 16, 16), (16, 16, 16), (32, 32)),
            build.tensor_ring(f"layers.{layer}.ring", (8, 8, 9), (8, 9, 8), (4, 4, 4)),
            build.kronecker(f"layers.{layer}.kron", (24, 24), (32, 48), 4),
            build.low_rank(f"layers.{layer}.low", 576, 1536, 128),
            build.tucker2(f"layers.{layer}.tucker", 1024, 1024, 256, 192),
            build.blast(f"layers.{layer}.blast", 576, 576, 24, (4, 4)),
            build.mixt(f"layers.{layer}.mixt", 576, 576, 4),
        )
    ]


def held(plan: FormPlan) -> int:
    return plan.planned_elements


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_linear_has_a_choice_within_the_limit(objective: str) -> None:
    linears = model()
    plan = choose_forms(linears, objective)
    assert list(plan.choices) == [linear.name for linear in linears]
    half = (plan.stored_elements + plan.dense_elements) / 2
    assert held(plan) <= (plan.stored_elements if objective == "memory" else half)
    for name, choice in plan.choices.items():
        assert choice.linear.name == name and choice.form in forms_of(choice.linear)
        assert choice.form.macs <= NAIVE * choice.form.in_features * choice.form.out_features
        assert re.search(r"x dense speed at [0-9, ]+ rows$", choice.reason), choice.reason


@pytest.mark.parametrize("objective", GUARDED)
def test_nothing_is_slower_than_dense_where_dense_fits(objective: str) -> None:
    plan = choose_forms(model(), objective, budget=PLENTY)
    for name, choice in plan.choices.items():
        assert min(choice.gains.values()) * SLOWER >= 1, (name, choice.reason)
        times = {rows: seconds(choice.form, rows) for rows in choice.gains}
        dense = {rows: seconds(forms_of(choice.linear)[-1], rows) for rows in choice.gains}
        assert {rows: dense[rows] / times[rows] for rows in times} == pytest.approx(dict(choice.gains))


def test_objectives_differ() -> None:
    """A train that reads few weights for one token, and works less than the matrix for many only when rebuilt."""
    linears = [build.tensor_train("wide", (16, 16, 16), (16, 16, 16), (32, 32))]
    names = {name: choose_forms(linears, name, budget=PLENTY).choices["wide"].form for name in OBJECTIVES}
    assert names["prefill"].dense and not names["decode"].dense and not names["memory"].merges
    decode = choose_forms(linears, "decode", budget=PLENTY).choices["wide"]
    assert decode.gains[1] > 2 and "merged for decode: 2.0x fewer MACs, +" in decode.reason
    prefill = choose_forms(linears, "prefill", budget=PLENTY).choices["wide"]
    assert prefill.reason.startswith("rebuilt dense for prefill: 4.2x fewer MACs, +65.99 MB; ")


def test_a_budget_is_kept_and_used() -> None:
    linears = model()
    smallest = choose_forms(linears, "memory").planned_elements
    dense = choose_forms(linears).dense_elements
    times = []
    for elements in (smallest, smallest + 50_000, dense // 4, dense // 2, 2 * dense):
        plan = choose_forms(linears, "balanced", budget=Budget(1000 + 4 * elements, 1000, 4))
        assert held(plan) <= elements
        times.append(sum(seconds(choice.form, rows) for choice in plan.choices.values() for rows in (1, 16, 128)))
    assert times[-1] == min(times) < 0.8 * times[0]


def test_a_budget_that_nothing_meets_names_the_smallest_that_would_do() -> None:
    linears = model()
    with pytest.raises(ResourceError, match=r"--memory-budget: the weights need at least ([0-9.,]+) MB") as caught:
        choose_forms(linears, budget=Budget(50_000, 20_000, 2))
    found = re.search(r"at least ([0-9.,]+) MB, the budget is 0.050 MB \(0.020 MB", str(caught.value))
    assert found is not None and caught.value.exit_code == 5
    nbytes = round(float(found[1].replace(",", "")) * 1e6)
    plan = choose_forms(linears, budget=Budget(nbytes, 20_000, 2))
    assert nbytes - 1000 - 2 * len(linears) <= 20_000 + 2 * held(plan) <= nbytes
    with pytest.raises(ResourceError):
        choose_forms(linears, budget=Budget(nbytes - 2000, 20_000, 2))


def test_what_is_forced_counts_in_the_budget() -> None:
    linears = model(1)
    room = choose_forms(linears, "memory").planned_elements + 576 * 576
    plan = choose_forms(linears, "memory", [("ring", "dense")], budget=Budget(4 * room, 0, 4))
    assert plan.choices["layers.0.ring"].form.dense and held(plan) <= room
    with pytest.raises(ResourceError):
        choose_forms(linears, "memory", [("ring|blast", "dense")], budget=Budget(4 * room, 0, 4))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_train_of_order_12_is_never_executed_naively(objective: str) -> None:
    """Rank 64 at 4096 x 4096: 20 times the dense work core by core."""
    linear = build.tensor_train("train", (2,) * 12, (2,) * 12, (64,) * 11)
    assert macs(linear) > 20 * 4096**2
    choice = choose_forms([linear], objective).choices["train"]
    assert choice.form.merges and choice.form.macs <= 8.5 * 4096**2
    assert choice.form.macs <= 2 * 4096**2 or objective == "memory"
    if objective == "memory":
        assert choice.form.elements <= linear.params


def test_naive_forms_are_the_last_resort_of_a_budget() -> None:
    linear = build.tensor_train("train", (64, 4), (4, 64), (4,))
    ways = forms_of(linear)
    assert ways[0].macs < NAIVE * 256 * 256
    ring = build.tensor_ring("ring", (4, 4, 4), (4, 4, 4), (12, 12, 12))
    stored = forms_of(ring)[0]
    assert stored.macs > NAIVE * 64 * 64 and stored.elements > 64 * 64
    assert choose_forms([ring], "memory").choices["ring"].form.dense


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_low_rank_stays_two_products_below_break_even(objective: str) -> None:
    linears = [build.low_rank("a", 48, 32, 6), build.low_rank("b", 2048, 2048, 1000, bias=True)]
    plan = choose_forms(linears, objective, budget=PLENTY)
    assert {choice.form.name for choice in plan.choices.values()} == {"chain"}
    above = choose_forms([build.low_rank("a", 512, 512, 400)], objective)
    assert above.choices["a"].form.dense


def test_shared_tensors_are_held_once() -> None:
    heads = [build.tucker_heads(f"m.{k}_proj", k, 512, 8, 64, (32, 8, 2), shared="m") for k in "qkvo"]
    plan = choose_forms(heads, "memory")
    once = {tensor.name: tensor.size for linear in heads for tensor in linear.tensors()}
    assert plan.stored_elements == sum(once.values())
    assert held(plan) <= 2.2 * plan.stored_elements  # the output projection reads some of them the other way round


def test_the_direction_is_chosen_by_cost() -> None:
    """Streaming 9 columns is slow: of the forms that hold no more, the one predicted to be fastest is taken."""
    for modes in (((8, 8, 9), (9, 8, 8)), ((9, 8, 8), (8, 8, 9)), ((8, 9, 8), (16, 12, 8))):
        linear = build.tensor_train("train", *modes, (8, 8))
        plan = choose_forms([linear], "memory")
        same = [form for form in forms_of(linear) if form.elements <= linear.params]
        assert len(same) > 1
        weights, totals = plan.objective.weights, {}
        for form in same:
            dense = forms_of(linear)[-1]
            totals[form.name] = sum(w * seconds(form, rows) / seconds(dense, rows) for rows, w in weights.items())
        assert totals[plan.choices["train"].form.name] == pytest.approx(min(totals.values()))


def test_overrides() -> None:
    plan = choose_forms(model(1), "memory", [("train", "merged:1,2-3"), ("kron", "chain:reversed"), ("blast", "dense")])
    names = {name.rpartition(".")[2]: choice.form.name for name, choice in plan.choices.items()}
    assert (names["train"], names["kron"], names["blast"]) == ("merged:1,2-3", "chain:reversed", "dense")
    with pytest.raises(UsageError, match=r"--form train=merged:9: layers.0.train has no such form; it has chain"):
        choose_forms(model(1), overrides=[("train", "merged:9")])
