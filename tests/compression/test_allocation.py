"""Allocation rules: the optimum against brute force, the budget on random shapes, the formula of SVD-LLM V2."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixt_export.compression.allocation import (
    ALLOCATIONS,
    WEIGHED,
    Candidate,
    from_file,
    kept_parameters,
    svd_llm_v2,
    uniform,
    water_filling,
)
from mixt_export.compression.allocation.candidates import total_loss
from mixt_export.compression.allocation.svd_llm_v2 import matrix_type
from mixt_export.compression.allocation.water_filling import _filled
from mixt_export.compression.method import RANK_RULES
from mixt_export.errors import UsageError


def candidates(shapes: list[tuple[int, int]], seed: int) -> list[Candidate]:
    rng = np.random.default_rng(seed)
    made = []
    for index, (out_features, in_features) in enumerate(shapes):
        loss = np.sort(rng.gamma(0.5, 10.0 ** rng.uniform(-2, 2), min(out_features, in_features)))[::-1]
        made.append(Candidate(f"l{index}", out_features, in_features, loss))
    return made


def loss_of(chosen: list[Candidate], ranks: dict[str, int | None]) -> float:
    return sum(c.loss[ranks[c.name] :].sum() for c in chosen if ranks[c.name] is not None)


def brute_force(chosen: list[Candidate], budget: float, floor: float) -> float:
    """The least loss over every combination of ranks and dense."""
    options = [
        [None, *range(max(1, int(np.ceil(floor * c.full_rank))), c.max_rank + 1)] if c.max_rank else [None]
        for c in chosen
    ]
    losses = [
        loss_of(chosen, dict(zip((c.name for c in chosen), ranks, strict=True)))
        for ranks in itertools.product(*options)
        if kept_parameters(chosen, dict(zip((c.name for c in chosen), ranks, strict=True))) <= budget
    ]
    return min(losses)


@given(
    seed=st.integers(0, 10_000),
    keep=st.floats(0.45, 1.0),
    shapes=st.lists(st.tuples(st.integers(5, 10), st.integers(5, 10)), min_size=1, max_size=3),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_water_filling_is_near_the_brute_force_optimum(seed: int, keep: float, shapes: list[tuple[int, int]]) -> None:
    chosen = candidates(shapes, seed)
    budget = keep * sum(c.dense_cost for c in chosen)
    ranks = water_filling(chosen, keep, 0.1)
    assert kept_parameters(chosen, ranks) <= budget
    best = brute_force(chosen, budget, 0.1)
    found = loss_of(chosen, ranks)
    assert found >= best * (1 - 1e-12)
    # Whole ranks and whole dense layers make it a knapsack: Lagrange is optimal up to one item of one linear. With the
    # budget lowered by the largest item even brute force does no better.
    item = max(c.dense_cost for c in chosen)
    if budget - item > sum(
        max(1, int(np.ceil(0.1 * c.full_rank))) * c.unit if c.max_rank else c.dense_cost for c in chosen
    ):
        assert found <= brute_force(chosen, budget - item, 0.1) * (1 + 1e-9)


def test_without_dense_candidates_the_optimum_is_exact() -> None:
    """Square linears of one size, budget far from dense: Lagrange with a greedy rest is the greedy optimum."""
    chosen = candidates([(12, 12)] * 3, 5)
    for keep in (0.35, 0.5):
        budget = keep * sum(c.dense_cost for c in chosen)
        ranks = water_filling(chosen, keep, 0.1)
        if None in ranks.values():
            continue
        assert loss_of(chosen, ranks) == pytest.approx(brute_force(chosen, budget, 0.1), rel=1e-9)


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.8, 0.9, 0.97])
def test_a_real_sized_budget_is_met_to_half_a_percent(keep: float) -> None:
    chosen = candidates([(576, 576), (192, 576), (576, 576), (1536, 576), (576, 1536)] * 4, 1)
    total = sum(c.dense_cost for c in chosen)
    kept = kept_parameters(chosen, water_filling(chosen, keep)) / total
    assert keep - 0.005 <= kept <= keep


def test_the_registry_is_what_the_command_line_lists() -> None:
    assert tuple(ALLOCATIONS) == RANK_RULES
    assert all(rule.weighs in WEIGHED for rule in ALLOCATIONS.values())


@given(
    rule=st.sampled_from(sorted(ALLOCATIONS)),
    seed=st.integers(0, 10_000),
    keep=st.floats(0.25, 0.999),
    shapes=st.lists(st.tuples(st.integers(2, 700), st.integers(2, 700)), min_size=1, max_size=12),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_keep_is_met_from_below_to_less_than_one_rank(
    rule: str, seed: int, keep: float, shapes: list[tuple[int, int]]
) -> None:
    """Whatever the shapes: within half a percent, or within one rank of every linear that is not dense."""
    chosen = candidates(shapes, seed)
    whole = sum(c.dense_cost for c in chosen)
    try:
        ranks = ALLOCATIONS[rule].choose(chosen, keep, 0.1)
    except UsageError:
        least = sum(c.unit if c.max_rank else c.dense_cost for c in chosen)
        assert least > keep * whole
        return
    left = keep * whole - kept_parameters(chosen, ranks)
    assert left >= -1e-6 * whole
    # of a linear the smallest rank that is not dense may be worth more than what is left
    units = [c.unit for c in chosen if ranks[c.name] is not None]
    assert left <= max(0.005 * whole, max(units, default=0)), (left / whole, ranks)
    for c in chosen:
        rank = ranks[c.name]
        assert rank is None or 1 <= rank <= c.max_rank


def test_large_linears_get_multiples_of_16_where_that_is_free() -> None:
    rng = np.random.default_rng(4)
    chosen = [
        Candidate(
            f"l{index}", *shape, 10.0 ** rng.uniform(-1, 1) * np.exp(-np.arange(min(shape)) / rng.uniform(50, 150))
        )
        for index, shape in enumerate([(576, 576), (192, 576), (1536, 576), (576, 1536)] * 20)
    ]
    for keep in (0.5, 0.7, 0.9):
        ranks = water_filling(chosen, keep)
        assert [name for name, rank in ranks.items() if rank is not None and rank % 16] == []
        exact = total_loss(chosen, _filled(chosen, keep, 0.1, dict.fromkeys(ranks, 1)))
        assert exact <= total_loss(chosen, ranks) <= 1.01 * exact
    steep = [Candidate("steep", 600, 600, np.r_[np.full(100, 1.0), np.full(500, 1e-9)])]
    ranks = water_filling(steep, 100 * 1200 / 360_000)
    assert ranks == {"steep": 100}, "16 ranks too few would cost all"


def test_svd_llm_v2_is_the_formula_of_the_paper() -> None:
    """Independent arithmetic for one group of equal shapes: removed share = |G| R l / Σ l, l = 1 / ln L."""
    rng = np.random.default_rng(0)
    chosen = []
    for layer in range(5):
        loss = np.sort(rng.gamma(0.5, 10.0 ** (layer + 4), 300))[::-1]
        chosen.append(Candidate(f"model.layers.{layer}.mlp.up_proj", 300, 400, loss))
    keep = 0.7
    rank = int(keep * 300 * 400 / 700)
    errors = np.array([np.sqrt(c.loss[rank:].sum()) for c in chosen])
    inverse = 1 / np.log(errors)
    removed = 5 * (1 - keep) * inverse / inverse.sum()
    ranks = svd_llm_v2(chosen, keep)
    for c, share in zip(chosen, removed, strict=True):
        found = ranks[c.name]
        assert found is not None
        assert abs(found - (1 - share) * 300 * 400 / 700) <= 1
    assert [ranks[c.name] for c in chosen] == sorted(ranks[c.name] or 0 for c in chosen), "more loss, more ranks"


def test_svd_llm_v2_groups_by_type_and_survives_small_losses() -> None:
    assert matrix_type("model.layers.12.mlp.experts.3.up_proj") == "model.layers.*.mlp.experts.*.up_proj"
    chosen = [
        Candidate("a.0.x", 50, 50, np.full(50, 1e-12)),
        Candidate("a.1.x", 50, 50, np.full(50, 1e9)),
        Candidate("a.0.y", 50, 50, np.zeros(50)),
    ]
    ranks = svd_llm_v2(chosen, 0.5)
    small, large = ranks["a.0.x"], ranks["a.1.x"]
    assert small is not None
    assert large is None or large > small
    assert abs(kept_parameters(chosen, ranks) / 7500 - 0.5) < 0.02
    assert ranks["a.0.y"] in (12, 13), "the other type keeps its share"


def test_a_linear_that_matters_more_gets_more() -> None:
    first = candidates([(40, 60)], 0)[0]
    second = Candidate("louder", 40, 60, first.loss * 100)
    ranks = water_filling([first, second], 0.5)
    low, high = ranks["l0"], ranks["louder"]
    assert low is not None
    assert high is None or high > low


def test_keep_one_keeps_everything_dense_and_tiny_linears_stay_dense() -> None:
    chosen = candidates([(30, 20), (1, 50)], 2)
    assert water_filling(chosen, 1.0) == {"l0": None, "l1": None}
    assert water_filling(chosen, 0.6)["l1"] is None
    assert uniform(chosen, 0.6) == {"l0": int((0.6 * 650 - 50) / 50), "l1": None}
    assert uniform(chosen, 1.0) == {"l0": None, "l1": None}


def test_the_floor_gives_way_to_the_budget_and_the_budget_to_nothing() -> None:
    chosen = candidates([(40, 40)], 3)
    assert water_filling(chosen, 0.1, floor=0.5) == {"l0": 2}
    with pytest.raises(UsageError, match="too small"):
        water_filling(chosen, 0.01)


def test_ranks_from_a_file(tmp_path: Path) -> None:
    chosen = [Candidate(name, 20, 30, np.zeros(0)) for name in ("a.q", "a.k", "b.q")]
    path = tmp_path / "ranks.json"

    def read(table: object) -> dict[str, int | None]:
        path.write_text(json.dumps(table))
        return from_file(path, chosen)

    assert read({"a.q": 4, r".*\.q": "dense", ".*": 20}) == {"a.q": 4, "a.k": 20, "b.q": None}
    bad = [
        ({"a.q": 4}, "no entry"),
        ({".*": 21}, "1 to 20"),
        ({".*": True}, "1 to 20"),
        ({".*": 3, "zzz": 3}, "none of the targeted"),
        ({"(": 3}, "regular expression"),
        ([], "object"),
    ]
    for table, words in bad:
        with pytest.raises(UsageError, match=words):
            read(table)
    path.write_text("{")
    with pytest.raises(UsageError, match="JSON"):
        from_file(path, chosen)
    with pytest.raises(UsageError, match="no such file"):
        from_file(tmp_path / "none.json", chosen)
