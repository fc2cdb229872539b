"""Each structure against its oracle in float64: densify, apply, einsum."""

from dataclasses import replace

import numpy as np
import pytest

from mixt_export.errors import NetworkError
from mixt_export.network import apply, build, densify, einsum
from tests.network.cases import CASES, SPARSE_CASES, Case, identity, mixt_matrix, random_values, relative

ALL = CASES + SPARSE_CASES


@pytest.mark.parametrize("case", ALL, ids=identity)
def test_densify_is_the_oracle(case: Case) -> None:
    values = random_values(case.linear, seed=1)
    dense = densify(case.linear, values.__getitem__)
    assert dense.dtype == np.float64
    assert relative(dense, case.matrix(values)) <= 1e-12


@pytest.mark.parametrize("shape", [(), (1,), (3, 7), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("case", ALL, ids=identity)
def test_apply_is_the_oracle(case: Case, shape: tuple[int, ...]) -> None:
    values = random_values(case.linear, seed=2)
    x = np.random.default_rng(3).standard_normal((*shape, case.linear.in_features))
    expected = x @ case.matrix(values).T
    if case.linear.bias is not None:
        expected = expected + values[case.linear.bias.name]
    assert relative(apply(case.linear, values.__getitem__, x), expected) <= 1e-12


@pytest.mark.parametrize("case", [case for case in CASES if len(case.linear.branches) == 1], ids=identity)
def test_einsum_is_what_numpy_needs(case: Case) -> None:
    (branch,) = case.linear.branches
    values = random_values(case.linear, seed=4)
    x = np.random.default_rng(5).standard_normal((2, 3, *(size for _, size in branch.in_modes)))
    y = np.einsum(einsum(branch), x, *(values[core.tensor.name] for core in branch.cores), optimize=True)
    expected = x.reshape(2, 3, -1) @ case.matrix(values).T
    assert relative(y.reshape(2, 3, -1), expected) <= 1e-12


def test_einsum_text() -> None:
    assert einsum(build.low_rank("l", 4, 5, 2).branches[0]) == "...a,ab,bc->...c"
    assert einsum(build.mixt("m", 8, 8, 2).branches[0]) == "...abc,db->...adc"


def test_float32_input_gives_float32() -> None:
    linear = build.low_rank("l", 7, 5, 3, dtype="float16")
    values = random_values(linear, seed=6, dtype="float16")
    x = np.random.default_rng(7).standard_normal((4, 7)).astype(np.float32)
    y = apply(linear, values.__getitem__, x)
    assert y.dtype == np.float32
    expected = x.astype(np.float64) @ densify(linear, values.__getitem__).T
    assert relative(y.astype(np.float64), expected) <= 1e-6


def test_trailing_padding_is_another_family_than_the_exact_form() -> None:
    """The same cores, cropped from the padded Kronecker sum, differ from the exact form; on powers of d they agree."""
    padded, exact = build.mixt("m", 12, 12, 3, paper_padding=True), build.mixt("m", 12, 12, 3)
    wide = random_values(padded, seed=8)
    cropped = {name: value[:3, :3] for name, value in wide.items()}
    assert relative(densify(padded, wide.__getitem__), densify(exact, cropped.__getitem__)) > 0.1
    same, power = build.mixt("m", 16, 8, 3, paper_padding=True), build.mixt("m", 16, 8, 3)
    values = random_values(same, seed=9)
    assert relative(densify(same, values.__getitem__), densify(power, values.__getitem__)) == 0.0


def test_a_swapped_core_is_seen() -> None:
    linear = build.mixt("m", 24, 24, 3)
    values = random_values(linear, seed=10)
    names = [tensor.name for tensor in linear.tensors()]
    swapped = dict(values)
    swapped[names[0]], swapped[names[2]] = values[names[2]], values[names[0]]
    expected = mixt_matrix(names, values, 2)
    assert relative(densify(linear, values.__getitem__), expected) <= 1e-12
    assert relative(densify(linear, swapped.__getitem__), expected) > 0.1


def test_a_lost_scale_is_seen() -> None:
    linear = build.mixt("m", 24, 24, 3)
    values = random_values(linear, seed=11)
    unscaled = replace(linear, branches=tuple(replace(branch, scale=1.0) for branch in linear.branches))
    expected = densify(linear, values.__getitem__)
    assert relative(densify(unscaled, values.__getitem__), 3.0 * expected) <= 1e-12
    assert relative(densify(unscaled, values.__getitem__), expected) > 0.1


@pytest.mark.parametrize("case", [case for case in CASES if len(case.linear.core_tensors()) > 1], ids=identity)
def test_every_core_matters(case: Case) -> None:
    values = random_values(case.linear, seed=12)
    before = densify(case.linear, values.__getitem__)
    for tensor in case.linear.core_tensors():
        changed = values | {tensor.name: values[tensor.name] + 1.0}
        assert relative(densify(case.linear, changed.__getitem__), before) > 1e-6


def test_loaded_tensor_of_another_shape_is_refused() -> None:
    linear = build.low_rank("layer", 7, 5, 3)
    values = random_values(linear, seed=13)
    values["layer.core1"] = values["layer.core1"].T
    with pytest.raises(NetworkError, match=r"'layer'.*'layer\.core1' of shape \(3, 5\), loaded \(5, 3\)"):
        densify(linear, values.__getitem__)


def test_input_of_another_width_is_refused() -> None:
    linear = build.low_rank("layer", 7, 5, 3)
    with pytest.raises(NetworkError, match=r"'layer'.*\(\.\.\., 7\), found shape \(2, 6\)"):
        apply(linear, random_values(linear, seed=14).__getitem__, np.zeros((2, 6)))


@pytest.mark.parametrize(("part", "index"), [("rows", 5), ("rows", -1), ("cols", 7)])
def test_sparse_index_outside_is_refused(part: str, index: int) -> None:
    linear = build.with_sparse(build.dense("layer", 7, 5), 3)
    values = random_values(linear, seed=15)
    values[f"layer.sparse.{part}"][1] = index
    with pytest.raises(NetworkError, match=rf"'layer'.*'layer\.sparse\.{part}', found {index}"):
        densify(linear, values.__getitem__)
