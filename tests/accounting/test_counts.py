"""Parameters and multiply-adds against the papers' formulas and published totals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mixt_export.accounting import Request, account, open_source, presets
from mixt_export.accounting.forms import forms_of
from mixt_export.network import build
from mixt_export.selection import parse_sizes
from tests.accounting import formulas
from tests.accounting.formulas import SHAPES


def counted(preset: str, method: str | None = "mixt", **request: Any) -> dict[str, dict[str, Any]]:
    report = account(open_source(preset), method, Request(**request))
    return {variant["name"]: variant for variant in report["variants"]}


def terms_of(terms: int) -> tuple[int, list[Any]]:
    return terms, []


def test_every_preset_has_the_published_size() -> None:
    assert sorted(SHAPES) == presets()
    for name, (shape, published) in SHAPES.items():
        dense = counted(name, None)["dense"]
        assert dense["parameters"]["total"] == shape.total() == published
        assert dense["blocks"] == [shape.dense_block()] * shape.blocks
        assert (
            dense["forms"]["dense"]["macs_per_token"] == shape.blocks * shape.dense_block() + shape.vocab * shape.hidden
        )


#: preset, replaced blocks, N_T -> change of the whole model in percent, padded and exact; None: not in the table.
TABLE = [
    ("llama2-7b", 17, 3, -38.36, -41.48),
    ("llama2-7b", 17, 4, -46.82, -47.87),
    ("llama2-7b", 17, 5, -49.73, -50.06),
    ("qwen3-8b", 11, 4, -23.87, -24.29),
    *[("smollm2-135m", n, 2, None, change) for n, change in ((1, -1.32), (2, -2.63), (4, -5.26), (15, -19.73))],
    *[("smollm2-135m", n, 3, None, change) for n, change in ((1, -2.14), (2, -4.28), (4, -8.55), (15, -32.06))],
    *[("smollm2-135m", n, 4, None, change) for n, change in ((1, -2.47), (2, -4.93), (4, -9.87), (15, -37.00))],
]


@pytest.mark.parametrize(("preset", "blocks", "terms", "padded_change", "exact_change"), TABLE)
def test_mixt_sizes(preset: str, blocks: int, terms: int, padded_change: float | None, exact_change: float) -> None:
    shape, dense = SHAPES[preset]
    found = counted(preset, blocks=f"last:{blocks}", n_tensors=terms_of(terms), paper_padding=True)
    saved = {"mixt, padded": formulas.padded_params, "mixt, exact": formulas.exact_params}
    changes = {"mixt, padded": padded_change, "mixt, exact": exact_change}
    for name, params in saved.items():
        block = sum(params(o, i, terms) for o, i in shape.linears())
        total = found[name]["parameters"]["total"]
        assert total == dense - blocks * (shape.dense_block() - block)
        assert found[name]["blocks"] == [shape.dense_block()] * (shape.blocks - blocks) + [block] * blocks
        if changes[name] is not None:
            assert round(100 * (total / dense - 1), 2) == changes[name]


def test_the_papers_configuration() -> None:
    found = counted("llama2-7b", blocks="last:17", paper_padding=True)
    assert found["mixt, padded"]["parameters"]["total"] == 3_583_250_432
    assert found["mixt, exact"]["parameters"]["total"] == 3_513_061_376
    assert found["dense"]["storage_bytes"]["float16"] == 2 * 6_738_415_616
    shape, _ = SHAPES["llama2-7b"]
    dense = 32 * shape.dense_block() + 131_072_000
    head = 15 * shape.dense_block() + 131_072_000
    expected = {
        "branches, all padding": head + 17 * sum(formulas.padded_macs(o, i, 4) for o, i in shape.linears()),
        "branches, no padding": head + 17 * shape.dense_block() // 2,
        "merged, no zeros": head + 17 * round(shape.dense_block() * formulas.share_of_support(4)),
        "parameters (Eq. 2)": head + 17 * 16_777_216,
        "dense": dense,
    }
    forms = found["mixt, padded"]["forms"]
    assert {name: forms[name]["macs_per_token"] for name in expected} == expected
    percent = {name: round(100 * (macs / dense - 1), 1) for name, macs in expected.items()}
    assert list(percent.values()) == [-17.5, -26.0, -35.8, -47.8, 0.0]
    assert not any(forms[name]["runs"] for name in list(expected)[:-1])
    # What runs skips blocks of padding as a whole: between all of it and none.
    assert expected["branches, no padding"] < forms["branches"]["macs_per_token"] < expected["branches, all padding"]
    exact = found["mixt, exact"]["forms"]
    assert exact["branches"]["macs_per_token"] == exact["pairs"]["macs_per_token"] == expected["branches, no padding"]
    assert exact["branches"]["training_macs_per_token"] == 3 * expected["branches, no padding"]
    assert exact["branches"]["block_macs"] == [shape.dense_block()] * 15 + [shape.dense_block() // 2] * 17
    assert exact["pairs"]["linear_weights"] == 15 * shape.dense_block() + 17 * shape.dense_block() // 8
    assert exact["dense"]["macs_per_token"] == dense


@pytest.mark.parametrize(
    ("inside", "out", "terms", "bond", "padded"),
    [(48, 104, 4, 2, False), (45, 27, 3, 3, False), (12, 20, 3, 2, False), (50, 70, 4, 2, True), (20, 33, 3, 3, True)],
)
def test_support_against_the_kronecker_products(inside: int, out: int, terms: int, bond: int, padded: bool) -> None:
    linear = build.mixt("x", inside, out, terms, bond=bond, paper_padding=padded)
    union, products = np.zeros((out, inside)), 0
    for k in range(terms):
        rows, columns = linear.branches[k].cores[0].tensor.shape
        term = np.kron(np.kron(np.eye(bond**k), np.ones((rows, columns))), np.eye(bond ** (terms - 1 - k)))
        products += np.count_nonzero(term[:out, :inside])
        union += term[:out, :inside]
    costs = forms_of(linear)
    assert costs["merged, no zeros"].macs == np.count_nonzero(union)
    exact = costs["branches, no padding"] if padded else costs["branches"]
    assert exact.macs == products
    if padded:
        assert costs["branches"].macs >= products


def test_n_tensors_by_type_and_low_rank_of_equal_size() -> None:
    shape, _ = SHAPES["smollm2-135m"]
    found = counted("smollm2-135m", blocks="3", n_tensors=parse_sizes(["2", "mlp=4"], "--n-tensors"))
    sizes = [formulas.exact_params(o, i, 2 if n < 4 else 4) for n, (o, i) in enumerate(shape.linears())]
    assert found["mixt"]["blocks"][3] == sum(sizes)
    ranks = [size // (o + i) for size, (o, i) in zip(sizes, shape.linears(), strict=True)]
    low = found["low rank, equal size"]
    assert low["blocks"][3] == sum(rank * (o + i) for rank, (o, i) in zip(ranks, shape.linears(), strict=True))
    assert low["types"]["q_proj"]["tensors"] == [[576, ranks[0]], [ranks[0], 576]]
    assert low["forms"]["branches"]["block_macs"][3] == low["blocks"][3]
    assert found["mixt"]["types"]["up_proj"] == {
        "shape": [1536, 576],
        "count": 30,
        "replaced": 1,
        "dense_params": 30 * 1536 * 576,
        "params": 29 * 1536 * 576 + 4 * 192 * 72,
        "tensors": [[192, 72]] * 4,
    }


def test_svd_keeps_a_share_and_biases_stay() -> None:
    shape, total = SHAPES["qwen2.5-7b"]
    found = counted("qwen2.5-7b", "svd", keep=0.8)["low rank, 0.8 kept"]
    kept = [int(0.8 * o * i / (o + i)) * (o + i) for o, i in shape.linears()]
    assert found["parameters"]["linears"] == 28 * sum(kept)
    assert found["parameters"]["total"] == total - 28 * (shape.dense_block() - sum(kept))
    # Rank 1 is larger than a 1 × n matrix: such a linear stays dense.
    full = counted("smollm2-135m", "svd", keep=1.0)["low rank, 1 kept"]
    assert full["parameters"]["linears"] <= 30 * SHAPES["smollm2-135m"][0].dense_block()


def test_storage_counts_scales() -> None:
    shape, total = SHAPES["smollm2-135m"]
    dense = counted("smollm2-135m", None)["dense"]["storage_bytes"]
    vectors = 30 * 2 * 576 + 576
    groups = 30 * sum(o * -(-i // 128) for o, i in shape.linears()) + 49152 * -(-576 // 128)
    assert dense == {
        "float32": 4 * total,
        "float16": 2 * total,
        "int8": total - vectors + 2 * groups + 2 * vectors,
        "int4": (total - vectors) // 2 + 2 * groups + 2 * vectors,
    }
    low = counted("smollm2-135m", blocks="0", n_tensors=terms_of(4))["mixt"]["storage_bytes"]
    cores = sum(4 * (o // 8) * -(-(i // 8) // 128) for o, i in shape.linears())
    saved = shape.dense_block() - sum(formulas.exact_params(o, i, 4) for o, i in shape.linears())
    lost = sum(o * -(-i // 128) for o, i in shape.linears())
    assert dense["int4"] - low["int4"] == saved // 2 + 2 * (lost - cores)


def test_defaults_are_those_of_compress() -> None:
    from mixt_export.accounting.methods import DEFAULT_KEEP, DEFAULT_TERMS, METHODS
    from mixt_export.compression.families import FAMILIES, LowRankOptions, MixTOptions
    from mixt_export.compression.method import get_method

    assert {name: FAMILIES[get_method(name).family].blocks for name in METHODS} == {
        name: method.blocks for name, method in METHODS.items()
    }
    assert (MixTOptions().n_tensors, MixTOptions().bond) == (DEFAULT_TERMS, Request().bond)
    assert LowRankOptions().keep == DEFAULT_KEEP
