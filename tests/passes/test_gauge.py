"""Any numbers in any freedom leave a network what it is, shared tensors included."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixt_export.network import Branch, Core, FactorizedLinear, TensorRef, best_orders, build
from mixt_export.network.order import steps
from mixt_export.passes.equalise import equalised, reach, scaled
from mixt_export.passes.gauge import Freedom, components, freedoms, with_states
from tests.network.random_networks import brute_matrix, linears


@st.composite
def groups(draw: st.DrawFn) -> list[FactorizedLinear]:
    """One to three random linears, some of whose tensors of equal shape are one tensor."""
    found = []
    names: dict[tuple[int, ...], str] = {}
    for number in range(draw(st.integers(1, 3))):
        linear = draw(linears())
        branches = []
        for branch in linear.branches:
            cores = []
            for core in branch.cores:
                own = f"{number}.{core.tensor.name}"
                shared = names.setdefault(core.tensor.shape, own) if draw(st.booleans()) else own
                cores.append(Core(replace(core.tensor, name=shared), core.labels))
            branches.append(replace(branch, cores=tuple(cores)))
        found.append(replace(linear, name=f"net{number}", branches=tuple(branches), bias=None))
    return found


def values_of(linears: list[FactorizedLinear], seed: int) -> dict[str, np.ndarray]:
    """Entries over many orders of magnitude."""
    rng = np.random.default_rng(seed)
    refs = {core.name: core for linear in linears for core in linear.core_tensors()}
    return {
        name: rng.standard_normal(ref.shape) * np.exp2(rng.integers(-9, 9, ref.shape)) for name, ref in refs.items()
    }


def moved(values: dict[str, np.ndarray], found: list[Freedom], numbers: list[np.ndarray]) -> dict[str, np.ndarray]:
    result = dict(values)
    for freedom, t in zip(found, numbers, strict=True):
        for (name, axes), power in freedom.powers.items():
            result[name] = scaled(result[name], {axes: power * t})
    return result


@given(groups(), st.integers(0, 2**31))
@settings(max_examples=120, deadline=None)
def test_any_powers_of_two_change_no_bit_and_any_numbers_no_value(group: list[FactorizedLinear], seed: int) -> None:
    rng, values, found = np.random.default_rng(seed), values_of(group, seed), freedoms(group)
    whole = moved(values, found, [rng.integers(-6, 7, freedom.shape).astype(float) for freedom in found])
    general = moved(values, found, [rng.uniform(-6, 6, freedom.shape) for freedom in found])
    for linear in group:
        before = brute_matrix(linear, values)
        np.testing.assert_array_equal(brute_matrix(linear, whole), before)
        size = brute_matrix(linear, {name: np.abs(value) for name, value in values.items()})
        bound = 1e-15 * (4 + 4 * len(found)) * np.abs(size)
        assert (np.abs(brute_matrix(linear, general) - before) <= bound).all()


@given(groups(), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_equalising_is_such_a_move_and_ends(group: list[FactorizedLinear], seed: int) -> None:
    values = values_of(group, seed)
    for members in components(group):
        own = {core.name for linear in members for core in linear.core_tensors()}
        exponents = equalised(freedoms(members), {name: values[name].copy() for name in own})
        after = {name: scaled(values[name], exponents.get(name, {})) for name in own}
        for linear in members:
            np.testing.assert_array_equal(brute_matrix(linear, after), brute_matrix(linear, values))


@given(groups())
@settings(max_examples=40, deadline=None)
def test_groups_share_nothing_with_each_other(group: list[FactorizedLinear]) -> None:
    found = components(group)
    assert sorted(linear.name for members in found for linear in members) == sorted(linear.name for linear in group)
    names = [{core.name for linear in members for core in linear.core_tensors()} for members in found]
    assert sum(map(len, names)) == len(set().union(*names))


@given(linears(), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_states_scale_as_said(linear: FactorizedLinear, seed: int) -> None:
    """The activation after each step, recomputed with scaled cores, is the old one times what `with_states` says."""
    rng, values = np.random.default_rng(seed), values_of([linear], seed)
    for freedom in freedoms([linear]):
        t = rng.integers(-6, 7, freedom.shape).astype(float)
        after = moved(values, [freedom], [t])
        for branch, order in zip(linear.branches, best_orders(linear), strict=True):
            x = rng.standard_normal([size for _, size in branch.in_modes])
            names = [f"state{step}" for step in range(len(order))]
            powers = with_states(freedom, branch, order, names).powers
            for name, old, new in zip(
                names, states(branch, order, x, values), states(branch, order, x, after), strict=True
            ):
                expected = old
                for (tensor, axes), power in powers.items():
                    if tensor == name:
                        expected = scaled(expected, {axes: power * t})
                np.testing.assert_allclose(new, expected, rtol=1e-12, atol=1e-12 * np.abs(expected).max(initial=0))


def states(branch: Branch, order: tuple[int, ...], x: np.ndarray, values: dict[str, np.ndarray]) -> list[np.ndarray]:
    letters = {label: index for index, label in enumerate(branch.sizes())}
    labels, result = [label for label, _ in branch.in_modes], []
    for index, (_, after) in zip(order, steps(branch, order), strict=True):
        core = branch.cores[index]
        x = np.einsum(
            x, [letters[one] for one in labels], values[core.tensor.name], [letters[one] for one in core.labels],
            [letters[one] for one in after],
        )  # fmt: skip
        labels = list(after)
        result.append(x)
    return result


def test_two_cores_meet_in_the_middle() -> None:
    """Slices of both cores of a low rank reach √(m₁ m₂), up to the rounding of exponents."""
    rng = np.random.default_rng(1)
    linear = build.low_rank("net", 7, 11, 5)
    spread = np.exp2(np.array([12.0, -12.0, 0.0, 7.0, -3.0]))
    values = {"net.core0": rng.standard_normal((7, 5)) * spread, "net.core1": rng.standard_normal((5, 11))}
    for whole, slack in ((True, 2.0), (False, 1e-3)):
        exponents = equalised(freedoms([linear]), {name: value.copy() for name, value in values.items()}, whole=whole)
        after = {name: scaled(values[name], exponents[name]) for name in values}
        apart = reach(after["net.core0"], (1,)) - reach(after["net.core1"], (0,))
        assert np.abs(apart).max() <= slack
        np.testing.assert_allclose(after["net.core0"] @ after["net.core1"], values["net.core0"] @ values["net.core1"])


def test_slices_of_zeros_are_left_alone() -> None:
    linear = build.low_rank("net", 3, 4, 2)
    values = {"net.core0": np.ones((3, 2)) * [0.0, 64.0], "net.core1": np.ones((2, 4))}
    exponents = equalised(freedoms([linear]), {name: value.copy() for name, value in values.items()})
    np.testing.assert_array_equal(exponents["net.core0"][(1,)], [0.0, -3.0])


@pytest.mark.parametrize(
    ("linear", "shapes"),
    [
        (build.monarch("net", (2, 3), (4, 5)), [(2, 5)]),
        (build.tensor_ring("net", (2, 3), (4, 5), (2, 3)), [(2, 3)]),
        (build.blast("net", 6, 8, 3, (2, 3)), [(3, 3), (3,), (2, 3)]),
        (build.kronecker("net", (2, 3), (4, 5), 3), [(3,)]),
        (build.mixt("net", 8, 16, 3), []),
    ],
    ids=["monarch", "ring", "blast", "kronecker", "mixt"],
)
def test_bonds_of_known_structures(linear: FactorizedLinear, shapes: list[tuple[int, ...]]) -> None:
    """Joint labels of reshaped bonds, hyperedges in pairs, a scalar where nothing is shared; mixtures have none."""
    found = sorted(tuple(sorted(freedom.shape)) for freedom in freedoms([linear]))
    assert found == sorted(tuple(sorted(shape)) for shape in shapes)


def test_shared_factors_are_scaled_for_all_who_use_them() -> None:
    """q, k, v and o of a Tucker model share U1: one number per column, taken from every core that reads it."""
    group = [build.tucker_heads(name, name, 12, 3, 4, (5, None, None), shared="attn") for name in ("q", "k", "v", "o")]
    (found,) = freedoms(group)
    assert found.shape == (5,)
    signs = {name: power for (name, _), power in found.powers.items()}
    assert set(signs) == {"attn.u1", "attn.core.q", "attn.core.k", "attn.core.v", "attn.core.o"}
    assert {-signs["attn.u1"]} == {sign for name, sign in signs.items() if name != "attn.u1"}
    assert components(group) == [group]


def test_a_bond_that_is_its_own_opposite_is_left_alone() -> None:
    """x · A · Aᵀ: D on the one side would have to be D⁻¹ on the other of the same tensor."""
    shared = TensorRef("a", (6, 3), "float64")
    branch = Branch((("i", 6),), (("o", 6),), (Core(shared, ("i", "r")), Core(shared, ("o", "r"))))
    assert freedoms([FactorizedLinear("net", 6, 6, (branch,))]) == []
