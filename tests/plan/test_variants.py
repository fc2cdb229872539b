"""Two forms of a linear in one plan: what is chosen, what it holds, where it stays away."""

from __future__ import annotations

from itertools import product

import pytest

from mixt_export.errors import UsageError
from mixt_export.network import FactorizedLinear, build
from mixt_export.plan import CPU, FormPlan, choose_forms, forms_of, planned_elements, seconds
from mixt_export.plan.choose import Budget
from mixt_export.plan.variants import WORTH, checked_mode, with_variants

LINEARS = [
    build.tensor_train("a.0.q", (16, 16, 16), (16, 16, 16), (32, 32)),
    build.with_sparse(build.tensor_train("a.0.up", (64, 64), (64, 172), (64,)), 900),
    build.low_rank("a.0.down", 4096, 4096, 512),
]
ROOMY = Budget(10**10, 0, 4)


def predicted(plan: FormPlan, tokens: int) -> float:
    choices = plan.choices if not plan.many or tokens < plan.switch else {**plan.choices, **plan.many}
    return sum(seconds(choice.form, tokens, CPU) for choice in choices.values())


def test_each_regime_gets_its_fastest_form() -> None:
    single = choose_forms(LINEARS, budget=ROOMY)
    plan = with_variants(single, budget=ROOMY)
    assert set(plan.many) == {"a.0.q", "a.0.up"}
    for name, linear in (("a.0.q", LINEARS[0]), ("a.0.up", LINEARS[1])):
        fastest = min(forms_of(linear), key=lambda form: seconds(form, 1, CPU))
        assert seconds(plan.choices[name].form, 1, CPU) == seconds(fastest, 1, CPU)
        assert plan.many[name].form.dense
        assert f"from {plan.switch} tokens on" in plan.many[name].reason
    assert plan.choices["a.0.down"] == single.choices["a.0.down"]
    assert predicted(plan, 1) < predicted(single, 1) / 2
    assert predicted(plan, 128) <= predicted(single, 128) * (1 + 1e-12)
    assert predicted(plan, plan.switch) < sum(seconds(c.form, plan.switch, CPU) for c in plan.choices.values())
    before = plan.switch // 2
    many = {**plan.choices, **plan.many}
    assert predicted(plan, before) <= sum(seconds(choice.form, before, CPU) for choice in many.values())


def test_what_both_hold_is_counted() -> None:
    plan = with_variants(choose_forms(LINEARS, budget=ROOMY), budget=ROOMY)
    both = sum(
        planned_elements([plan.choices[name], *([plan.many[name]] if name in plan.many else [])])
        for name in plan.choices
    )
    assert plan.planned_elements == both
    assert plan.planned_elements > planned_elements(plan.choices.values()) + 4096 * 4096


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9])
def test_a_budget_is_kept(share: float) -> None:
    dense = sum(linear.in_features * linear.out_features for linear in LINEARS)
    budget = Budget(int(share * dense) * 4 + 4 * 10**7, 10**7, 4)
    plan = with_variants(choose_forms(LINEARS, budget=budget), budget=budget)
    assert plan.planned_elements <= budget.elements


def test_no_pair_within_the_limit_is_better() -> None:
    """One linear: every pair of forms by brute force."""
    linear = LINEARS[0]
    budget = Budget(4 * int(1.2 * 4096 * 4096), 0, 4)
    plan = with_variants(choose_forms([linear], budget=budget), budget=budget)
    dense, weights = forms_of(linear)[-1], plan.objective.weights

    def score(few: object, many: object) -> float:
        return sum(
            weight * seconds(few if rows == 1 else many, rows, CPU) / seconds(dense, rows, CPU)  # type: ignore[arg-type]
            for rows, weight in weights.items()
        )

    best = min(score(few, many) for few, many in product(forms_of(linear), repeat=2))
    assert score(plan.choices[linear.name].form, plan.many[linear.name].form) == pytest.approx(best)


def test_stays_away() -> None:
    """Where only one regime was asked for, where forms are fixed, and where it gains less than it has to."""
    for objective in ("decode", "prefill", "memory"):
        plan = choose_forms(LINEARS, objective, budget=ROOMY)
        assert with_variants(plan, budget=ROOMY) is plan
    plan = choose_forms(LINEARS, overrides=[("q$|up$", "dense")], budget=ROOMY)
    assert not with_variants(plan, fixed=["a.0.q", "a.0.up"], budget=ROOMY).many
    low: list[FactorizedLinear] = LINEARS[2:]
    plan = choose_forms(low)
    assert with_variants(plan) is plan
    assert WORTH > 1


def test_modes() -> None:
    assert [checked_mode("auto", typed) for typed in (False, True)] == ["one", "none"]
    assert checked_mode("one", True) == "one"
    with pytest.raises(UsageError, match="two graphs are not offered"):
        checked_mode("two", False)
