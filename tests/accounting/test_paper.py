"""The comparison with the paper: what is said to reproduce a value does, to its last digit; the rest by formulas."""

from __future__ import annotations

from typing import Any

import pytest

from mixt_export.accounting import Request, account, open_source
from tests.accounting import formulas

SHAPE, DENSE = formulas.SHAPES["llama2-7b"]
BLOCK, HEAD, GIB = SHAPE.dense_block(), 32000 * 4096, 2**30
PADDED = DENSE - 17 * (BLOCK - 16_777_216)


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, Any]]:
    report = account(open_source("llama2-7b"), "mixt", Request(blocks="last:17"))
    return {row["quantity"]: row for row in report["paper"]}


@pytest.mark.parametrize(
    ("quantity", "rebuilt"),
    [
        ("parameters", "cores without rows for padded outputs"),
        ("storage, 16 bits", "padded"),
        ("storage, int4", "dense linears at 2 bits, the rest at 4"),
        ("training FLOPs", "forward, MixT blocks as 0"),
    ],
)
def test_reproduced_values(rows: dict[str, dict[str, Any]], quantity: str, rebuilt: str) -> None:
    row = rows[quantity]
    assert [round(value, 2) for value in row["rebuilt"][rebuilt]] == row["reported"]


def test_values_by_formula(rows: dict[str, dict[str, Any]]) -> None:
    gate = 4 * (11008 // 8) * 512
    mixed = DENSE - 17 * (BLOCK - 4 * 1_048_576 - 2 * gate - 4_194_304)
    small = (BLOCK * 32 / 2 + DENSE - BLOCK * 32) / 2, (BLOCK * 15 / 2 + PADDED - BLOCK * 15) / 2
    forward = 32 * BLOCK + HEAD
    branches = 15 * BLOCK + 17 * BLOCK // 2 + HEAD
    expected = {
        ("parameters", "padded"): (DENSE / 1e9, PADDED / 1e9),
        ("parameters", "exact"): (DENSE / 1e9, 3.513061376),
        ("parameters", "cores without rows for padded outputs"): (DENSE / 1e9, mixed / 1e9),
        ("storage, int8", "padded"): (DENSE / GIB, PADDED / GIB),
        ("storage, int4", "dense linears at 2 bits, the rest at 4"): (small[0] / GIB, small[1] / GIB),
        ("inference FLOPs", "branches, no padding"): (110e-9 * forward, 110e-9 * branches),
        ("training FLOPs", "forward + backward, no padding"): (6 * 2048e-12 * forward, 6 * 2048e-12 * branches),
        ("inference memory", "weights, float32"): (4 * DENSE / GIB, 4 * PADDED / GIB),
        ("training memory", "weights + gradients, 16 bits"): (4 * DENSE / GIB, 4 * PADDED / GIB),
    }
    for (quantity, name), values in expected.items():
        assert rows[quantity]["rebuilt"][name] == pytest.approx(values, rel=1e-9), (quantity, name)
    assert round(rows["inference FLOPs"]["rebuilt"]["branches, all padding"][0], 2) == 726.78


def test_what_the_sentences_claim(rows: dict[str, dict[str, Any]]) -> None:
    before, after = rows["storage, int8"]["reported"]
    assert [round(100 * (size / GIB / said - 1), 1) for size, said in ((DENSE, before), (PADDED, after))] == [1.4, 1.1]
    before, after = rows["inference memory"]["reported"]
    assert round(before - after, 2) == 28.35 > 4 * DENSE / 1e9 > 4 * DENSE / GIB
    dense, mixt = rows["inference memory"]["rebuilt"]["batch 1, 2,048 tokens, 16 bits"]
    assert 1 - mixt / dense < 1 - PADDED / DENSE
    before, after = rows["training memory"]["reported"]
    assert [round(before - 4 * DENSE / GIB, 1), round(after - 4 * PADDED / GIB, 1)] == [2.6, 4.2]
    for form in rows["inference FLOPs"]["rebuilt"].values():
        assert abs(form[1] - 457.34) > 5
