"""The cost model: hand-computed values, monotonicity, what it says of shapes a runtime is slow at."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from mixt_export.network import build
from mixt_export.plan import CPU, Device, forms_of, seconds
from mixt_export.plan.cost import amounts, operation_seconds
from mixt_export.plan.devices import RATES
from mixt_export.plan.operations import Operation

ONE = Device("units", **dict.fromkeys(RATES, 1.0), tile=16, cache=400)  # 100 numbers are near


def right(rows: int, inner: int, columns: int) -> Operation:
    return Operation("right", 1, rows, inner, columns, inner * columns)


def test_right_product_by_hand() -> None:
    """3 tokens x 5 rows, 7 inner, 20 columns: 2 tiles of 16."""
    found = amounts(right(5, 7, 20), 3, ONE)
    assert found == {
        "node": 1,
        "mac": 15 * 7 * 32,
        "row": 15,
        "stream": 7 * 32,
        "read": 100,  # of 105
        "read_far": 5,
        "write": 100,  # of 300
        "write_far": 200,
    }
    assert operation_seconds(right(5, 7, 20), 3, ONE) == sum(found.values())


def test_left_product_by_hand() -> None:
    """Weight (6, 4) times 2 activations (4, 10) per token, 3 tokens: 6 calls of 6 rows, 10 columns in a tile of 16."""
    found = amounts(Operation("left", 2, 10, 4, 6, 24, tokens="batch"), 3, ONE)
    assert found == pytest.approx(
        {
            "node": 1,
            "call": 6,
            "mac": 6 * 6 * 4 * 16,
            "row": 36,
            "stream": 24,
            "pack": 100 * 1.6,  # of 6 · 4 · 10 numbers, each column block padded from 10 to 16
            "pack_far": 140 * 1.6,
            "write": 100,
            "write_far": 260,
        }
    )


def test_left_product_with_the_tokens_last_is_one_wide_product() -> None:
    found = amounts(Operation("left", 2, 10, 4, 6, 24), 3, ONE)
    assert found["call"] == 2 and found["mac"] == 2 * 6 * 4 * 32 and found["row"] == 12


def test_batched_product_packs_only_for_several_rows() -> None:
    operation = Operation("batched", 3, 1, 8, 16, 3 * 8 * 16)
    one, two = (amounts(operation, tokens, ONE) for tokens in (1, 2))
    assert one["stack"] == two["stack_packed"] == 3 * 8 * 16
    assert "stack_packed" not in one and "stack" not in two
    assert (one["mac"], two["mac"]) == (3 * 8 * 16, 2 * 3 * 8 * 16)


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        (Operation("reshape"), {"node": 1}),
        (Operation("transpose", moved=60), {"node": 1, "transpose": 100, "transpose_far": 20}),
        (Operation("transpose", inner=5, moved=30), {"node": 1, "block": 6, "transpose": 60}),
        (Operation("transpose", inner=1, moved=30), {"node": 1, "scatter": 30, "transpose": 60}),
        (Operation("elementwise", moved=30), {"node": 1, "move": 60}),
        (Operation("pad", moved=30), {"node": 1, "move": 60}),
        (Operation("sparse", weights=9, moved=20), {"node": 1, "gather": 18, "move": 40}),
        (Operation("fused", 1, 1, 4, 5, 20, moved=9), {"node": 1, "mac": 40, "stream": 20, "move": 18}),
    ],
)
def test_other_kinds_by_hand(operation: Operation, expected: dict[str, float]) -> None:
    assert amounts(operation, 2, ONE) == expected


LINEARS = [
    build.low_rank("l", 576, 1536, 64),
    build.tensor_train("l", (8, 8, 9), (8, 8, 9), (16, 16)),
    build.tucker2("l", 576, 576, 72, 72),
    build.kronecker("l", (24, 24), (24, 24), 4),
    build.blast("l", 576, 576, 32, (4, 4)),
    build.monarch("l", (24, 24), (24, 24)),
    build.mixt("l", 576, 576, 4),
]


@pytest.mark.parametrize("linear", LINEARS, ids=lambda linear: linear.method)
def test_a_form_costs_the_sum_of_its_operators_and_more_rows_cost_more(linear) -> None:  # type: ignore[no-untyped-def]
    for form in forms_of(linear):
        times = [seconds(form, rows) for rows in (1, 2, 16, 17, 128)]
        assert times[0] < times[1] < times[2] < times[3] < times[4] or not form.dense
        assert times[0] < times[2] < times[4]
        apart = sum(operation_seconds(operation, 16) for operation in form.operations)
        kinds = [operation.kind for operation in form.operations]
        if ("transpose", "right") not in pairwise(kinds):
            assert times[2] == pytest.approx(apart)


@pytest.mark.parametrize("name", RATES)
def test_no_constant_makes_anything_cheaper(name: str) -> None:
    dearer = replace(CPU, **{name: getattr(CPU, name) + 1e-9})
    costs = [
        (seconds(form, rows, dearer), seconds(form, rows))
        for linear in LINEARS
        for form in forms_of(linear)
        for rows in (1, 16)
    ]
    assert all(after >= before for after, before in costs)
    used = {
        key
        for linear in LINEARS
        for form in forms_of(linear)
        for op in form.operations
        for key in amounts(op, 512, CPU)
    }
    used |= {
        key for linear in LINEARS for form in forms_of(linear) for op in form.operations for key in amounts(op, 1, CPU)
    }
    assert name in used or name in ("gather", "pack_far", "read_far", "transpose_far")


def test_narrow_columns_cost_as_much_as_a_whole_tile() -> None:
    assert operation_seconds(right(64, 64, 9), 16) > 0.9 * operation_seconds(right(64, 64, 16), 16)
    per_mac = [operation_seconds(right(1, 1024, columns), 128) / columns for columns in (4, 16, 64, 256)]
    assert per_mac == sorted(per_mac, reverse=True) and per_mac[0] > 3 * per_mac[1]


def test_one_row_is_bound_by_the_weights_and_many_rows_by_arithmetic() -> None:
    dense = right(1, 4096, 4096)
    assert operation_seconds(dense, 1) == pytest.approx(CPU.stream * 4096**2, rel=0.1)
    assert operation_seconds(dense, 1024) == pytest.approx(CPU.mac * 1024 * 4096**2, rel=0.1)


def test_order_twelve_is_never_executed_naively() -> None:
    """Ranks of 64 at 4096²: the chain of cores has 13 times and more the dense multiply-adds."""
    linear = build.tensor_train("l", (2,) * 12, (2,) * 12, (4, 16, *(64,) * 7, 16, 4))
    forms = forms_of(linear)
    for rows in (1, 16, 128):
        best = min(forms, key=lambda form: seconds(form, rows))
        assert best.macs <= 2 * 4096**2
        assert seconds(best, rows) <= seconds(forms[-1], rows)
