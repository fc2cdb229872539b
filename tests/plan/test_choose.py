"""The choice of forms: limits kept, targets met by prediction, overrides followed, bad input refused."""

from __future__ import annotations

import numpy as np
import pytest

from mixt_export.errors import UsageError
from mixt_export.network import build
from mixt_export.plan import OBJECTIVES, FormPlan, choose_forms
from mixt_export.plan.objectives import SLOWER


def decoder(hidden: int, kv: int, ffn: int, terms: int, layers: int = 4) -> list:
    shapes = {"q": (hidden, hidden), "k": (hidden, kv), "v": (hidden, kv), "o": (hidden, hidden)}
    shapes |= {"gate": (hidden, ffn), "up": (hidden, ffn), "down": (ffn, hidden)}
    return [
        build.mixt(f"layers.{layer}.{name}", *shape, terms) for layer in range(layers) for name, shape in shapes.items()
    ]


def forms(plan: FormPlan) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for name, choice in plan.choices.items():
        found.setdefault(name.rpartition(".")[2], set()).add(choice.form.name)
    return found


@pytest.mark.parametrize("terms", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("sizes", [(64, 32, 192), (576, 192, 1536), (2048, 512, 8192), (4096, 4096, 11008)])
def test_limits(sizes: tuple[int, int, int], objective: str, terms: int) -> None:
    plan = choose_forms(decoder(*sizes, terms), objective)
    assert len(plan.choices) == 28 and plan.objective.name == objective
    half = (plan.stored_elements + plan.dense_elements) / 2
    assert plan.planned_elements <= (plan.stored_elements if objective == "memory" else half)
    assert plan.stored_elements * 2 ** (2 * terms - 2) == plan.dense_elements * terms
    assert not all(choice.form.dense for choice in plan.choices.values())
    assert all(choice.reason.count(":") >= 1 and len(choice.reason) < 200 for choice in plan.choices.values())


def test_four_terms_are_merged_in_pairs() -> None:
    plan = choose_forms(decoder(576, 192, 1536, 4))
    assert set.union(*forms(plan).values()) == {"pairs"}
    assert plan.choices["layers.0.q"].gains[128] > 1.5
    large = choose_forms([build.mixt("linear", 2048, 2048, 4)]).choices["linear"]
    assert large.form.name == "pairs" and large.gains[128] > 1.8 and large.gains[1] > 5
    assert set.union(*forms(choose_forms(decoder(576, 192, 1536, 4), "memory")).values()) <= {
        "branches", "branches-left",
    }  # fmt: skip


def test_nowhere_slower_than_dense_where_the_limit_allows() -> None:
    """Small and large linears together: what merging saves on the small ones is nothing beside the large ones."""
    small = [build.mixt(f"small.{index}", 64, 32, 4) for index in range(5)]
    plan = choose_forms([*small, build.mixt("large", 4096, 4096, 4)])
    assert {plan.choices[linear.name].form.name for linear in small} == {"dense"}
    assert plan.choices["large"].form.name != "dense"
    for choice in plan.choices.values():
        assert min(choice.gains.values()) * SLOWER >= 1


def test_the_smallest_go_first_when_the_limit_is_tight() -> None:
    """Two terms: only the dense form avoids the loss at many rows, and not all may become dense."""
    plan = choose_forms(decoder(576, 192, 1536, 2))
    found = forms(plan)
    assert found["k"] == found["v"] == {"dense"}
    assert "branches" in found["gate"] | found["up"] | found["down"]


def test_terms_that_share_a_core_count_it_once() -> None:
    linear = build.mixt("linear", 64, 64, 3, names=["one", "one", "one"])
    plan = choose_forms([linear, build.mixt("again", 64, 64, 3, names=["one", "one", "one"])], "memory")
    assert plan.stored_elements == 16 * 16
    assert plan.choices["linear"].form.partition == (1, 1, 1)


def test_nothing_to_choose() -> None:
    assert choose_forms([]).planned_elements == 0


def test_overrides() -> None:
    linears = decoder(576, 192, 1536, 4)
    plan = choose_forms(linears, "memory", [("q|k", "dense"), (r"layers\.1\.k$", "merged:1+3"), ("down", "pairs-left")])
    found = {name: choice.form.name for name, choice in plan.choices.items()}
    assert found["layers.0.q"] == found["layers.0.k"] == "dense" and found["layers.1.k"] == "merged:1+3"
    assert found["layers.3.down"] == "pairs-left" and found["layers.0.up"] in ("branches", "branches-left")
    assert plan.choices["layers.0.q"].reason.startswith("asked for by --form")


@pytest.mark.parametrize(
    ("objective", "override", "text"),
    [
        ("speed", [], "--optimize-for speed: is none of balanced, decode, prefill, memory"),
        ("balanced", [("q(", "pairs")], "expression is invalid"),
        ("balanced", [("lm_head", "pairs")], "no factorised linear of the model matches"),
        ("balanced", [("q", "triples")], "has no such form; it has branches, "),
    ],
)
def test_bad_input(objective: str, override: list[tuple[str, str]], text: str) -> None:
    with pytest.raises(UsageError, match=text.replace("(", r"\(")):
        choose_forms(decoder(64, 32, 192, 3, layers=1), objective, override)


def test_the_exchange_never_passes_the_limit() -> None:
    rng = np.random.default_rng(3)
    for _ in range(30):
        sizes = rng.integers(1, 60, (6, 2)) * 16
        linears = [build.mixt(f"l{i}", *map(int, pair), int(rng.integers(2, 6))) for i, pair in enumerate(sizes)]
        plan = choose_forms(linears)
        assert plan.planned_elements <= (plan.stored_elements + plan.dense_elements) / 2
