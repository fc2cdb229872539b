"""Pivot rows of a product of two matrices against float64 matrices, and what the form says it costs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mixt_export.network import Branch, Core, FactorizedLinear, SparseResidual, TensorRef, build
from mixt_export.plan import Budget, Choice, choose_forms, forms_of, named_forms, planned_elements
from mixt_export.plan.pivot import BOUND, Pivots, factors, pivot_form, pivots
from mixt_export.plan.report import plan_entry
from mixt_export.plan.variants import with_variants

UNIT = 2.0**-24


def rebuilt(found: Pivots, dtype: type = np.float64) -> np.ndarray:
    """(out, in), row by row: the pivots, and the others as sums over them."""
    pivot_rows = found.rows.astype(dtype).astype(np.float64).T
    rest = found.rest.astype(dtype).astype(np.float64)
    others = [sum(rest[j, k] * pivot_rows[j] for j in range(len(pivot_rows))) for k in range(rest.shape[1])]
    stacked = [*pivot_rows, *others]
    return np.array([stacked[place] for place in found.order])


def off(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


SIZES = [(48, 104, 8), (104, 48, 8), (7, 5, 3), (30, 40, 30), (40, 30, 30), (20, 20, 20), (9, 6, 1), (64, 200, 40)]


@pytest.mark.parametrize("n_in, n_out, rank", SIZES)
def test_rows_are_those_of_the_matrix_and_the_others_follow(n_in: int, n_out: int, rank: int) -> None:
    rng = np.random.default_rng(n_in + rank)
    down, up = rng.standard_normal((n_in, rank)), rng.standard_normal((rank, n_out))
    matrix = (down @ up).T
    found = pivots(down, up, UNIT)
    assert not found.refusal and found.order.dtype == np.int32
    assert found.rows.shape == (n_in, rank) and found.rest.shape == (rank, n_out - rank)
    assert sorted(found.order) == list(range(n_out))
    assert off(rebuilt(found), matrix) < 1e-13
    kept = [o for o in range(n_out) if found.order[o] < rank]
    np.testing.assert_allclose(found.rows.T, matrix[kept], rtol=1e-12, atol=1e-12)
    assert np.abs(found.rest).max(initial=0.0) <= BOUND
    assert off(rebuilt(found, np.float32), matrix) < min(found.error, 1e-6)


def conditioned(rng: np.random.Generator, rows: int, columns: int, smallest: float) -> np.ndarray:
    """(rows, columns), rows ≤ columns, singular values from 1 down to ``smallest``."""
    left, _ = np.linalg.qr(rng.standard_normal((rows, rows)))
    right, _ = np.linalg.qr(rng.standard_normal((columns, rows)))
    return (left * np.geomspace(1.0, smallest, rows)) @ right.T


@pytest.mark.parametrize("smallest", [1e-6, 1e-12])
@pytest.mark.parametrize("which", ["up", "down", "both", "undone"])
def test_ill_conditioned_factors(which: str, smallest: float) -> None:
    """``undone``: one factor takes back what the other does, so that the matrix is as well-conditioned as any."""
    rng = np.random.default_rng(5)
    up = conditioned(rng, 24, 90, smallest) if which in ("up", "both") else rng.standard_normal((24, 90))
    down = conditioned(rng, 24, 60, smallest).T if which in ("down", "both") else rng.standard_normal((60, 24))
    if which == "undone":
        scale = np.geomspace(1.0, smallest, 24)
        up, down = up * scale[:, None], down / scale
    found = pivots(down, up, UNIT)
    assert not found.refusal and np.abs(found.rest).max() <= BOUND
    assert off(rebuilt(found), (down @ up).T) < 1e-13 and off(rebuilt(found, np.float32), (down @ up).T) < 1e-6


@pytest.mark.parametrize("true_rank", [0, 1, 5, 11])
def test_a_matrix_of_lower_rank_than_its_factors(true_rank: int) -> None:
    rng = np.random.default_rng(true_rank)
    inner = rng.standard_normal((12, true_rank)) @ rng.standard_normal((true_rank, 12))
    down, up = rng.standard_normal((31, 12)), inner @ rng.standard_normal((12, 50))
    found = pivots(down, up, UNIT)
    assert not found.refusal and found.rows.shape == (31, 12) and found.rest.shape == (12, 38)
    assert np.abs(rebuilt(found) - (down @ up).T).max() < 1e-10
    assert sorted(found.order) == list(range(50))


def test_exchanges_bound_what_greedy_pivots_leave() -> None:
    """Kahan's matrix: greedy pivots leave entries that grow exponentially with its size."""
    sine, cosine = np.sin(1.2), np.cos(1.2)
    size = 40
    kahan = np.diag(sine ** np.arange(size)) @ (np.eye(size) - cosine * np.triu(np.ones((size, size)), 1))
    kahan *= 1 - 1e-10 * np.arange(size)  # the columns' norms fall strictly: greedy pivots take them in order
    up = kahan[: size - 1]
    loose = pivots(np.eye(size - 1), up, UNIT, bound=1e9, loss=1e9)
    assert np.abs(loose.rest).max() > 20 and off(rebuilt(loose), up.T) < 1e-10
    strict = pivots(np.eye(size - 1), up, UNIT)
    assert not strict.refusal and np.abs(strict.rest).max() <= BOUND and off(rebuilt(strict), up.T) < 1e-12


def test_what_is_not_accurate_enough_is_refused_with_a_reason() -> None:
    rng = np.random.default_rng(1)
    down, up = rng.standard_normal((30, 10)), rng.standard_normal((10, 50))
    assert "rounding would cost" in pivots(down, up, UNIT, loss=0.5).refusal
    assert "times a pivot row" in pivots(down, up, UNIT, bound=1e-3).refusal
    down[3, 4] = np.nan
    assert "not finite" in pivots(down, up, UNIT).refusal


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("n_in, n_out, rank", [(48, 104, 8), (20, 20, 20), (30, 20, 20)])
def test_the_form_counts_what_it_executes(n_in: int, n_out: int, rank: int, bias: bool) -> None:
    linear = build.low_rank("linear", n_in, n_out, rank)
    linear = replace(linear, bias=TensorRef("b", (n_out,), "float32") if bias else None)
    form = pivot_form(linear)
    assert form is not None and form.rank == rank and not form.dense and form.bias == bias
    assert form.elements == form.macs == rank * (n_in + n_out) - rank * rank
    assert form.transposes == (0 if rank == n_out else 2) and planned_elements([Choice(linear, form)]) == form.elements
    assert [op.kind for op in form.operations].count("right") == (1 if rank == n_out else 2)
    assert named_forms(linear)[-1].dense and form in named_forms(linear) and form not in forms_of(linear)


def test_a_sparse_residual_is_counted_too() -> None:
    refs = [TensorRef(side, (11,), dtype) for side, dtype in (("r", "int64"), ("c", "int64"), ("v", "float32"))]
    plain = build.low_rank("linear", 48, 104, 8)
    form, whole = pivot_form(plain), pivot_form(replace(plain, sparse=SparseResidual(*refs)))
    assert form is not None and whole is not None
    assert whole.elements == form.elements + 11 and whole.macs == form.macs + 11


@pytest.mark.parametrize(
    "linear",
    [
        build.tucker2("linear", 32, 24, 16, 8),
        build.tensor_train("linear", (4, 8), (8, 4), (6,)),
        build.kronecker("linear", (4, 8), (8, 4), 2),
        build.mixt("linear", 64, 64, 3),
        build.low_rank("linear", 16, 40, 17),
        build.low_rank("linear", 40, 16, 17),
    ],
    ids=["three cores", "train", "kronecker", "mixt", "more than inputs", "more than outputs"],
)
def test_other_structures_have_no_pivots(linear: FactorizedLinear) -> None:
    assert pivot_form(linear) is None and all(form.name != "pivot" for form in named_forms(linear))


def test_any_order_of_labels_and_cores_is_read() -> None:
    rng = np.random.default_rng(0)
    arrays = {"u": rng.standard_normal((9, 4)).astype(np.float32), "v": rng.standard_normal((4, 7)).astype(np.float32)}
    cores = (
        Core(TensorRef("u", (9, 4), "float32"), ("o", "k")),
        Core(TensorRef("v", (4, 7), "float32"), ("k", "i")),
    )
    linear = FactorizedLinear("linear", 7, 9, (Branch((("i", 7),), (("o", 9),), cores, 0.5),))
    form = pivot_form(linear)
    assert form is not None and form.rank == 4
    down, up = factors(linear, arrays.__getitem__)
    expected = 0.5 * (arrays["u"].astype(np.float64) @ arrays["v"].astype(np.float64))
    np.testing.assert_allclose((down @ up).T, expected, rtol=1e-14)
    assert off(rebuilt(pivots(down, up, UNIT)), expected) < 1e-14


def test_it_is_never_chosen_unasked() -> None:
    linears = [build.low_rank(f"l.{index}", 64, 96, 30) for index in range(3)]
    for objective in ("balanced", "decode", "prefill", "memory"):
        plan = choose_forms(linears, objective)
        assert all(choice.form.name != "pivot" for choice in plan.choices.values())
    held = plan.planned_elements
    asked = with_variants(choose_forms(linears, overrides=[("0", "pivot")]), fixed=["l.0"])
    assert [choice.form.name for choice in asked.choices.values()].count("pivot") == 1
    assert asked.planned_elements == held - 30 * 30
    entry = plan_entry(asked)["forms"]["l.0"]
    assert entry["form"] == "pivot" and entry["elements"] == entry["macs"] == 30 * 160 - 900
    assert "asked for by --form" in entry["reason"]
    budget = Budget(4 * (held - 900), 0, 4)
    fitted = choose_forms(linears, overrides=[("0", "pivot")], budget=budget)
    assert fitted.planned_elements == budget.elements
