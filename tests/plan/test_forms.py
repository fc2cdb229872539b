"""Every form is the same matrix, and costs what it says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mixt_export.network import Branch, Core, FactorizedLinear, TensorRef, build, macs
from mixt_export.plan import MixtForm, Mixture, mixt_forms
from mixt_export.plan.merge import merged
from tests.plan.oracle import CASES, case


def matrix_of(form: MixtForm, mixture: Mixture, cores: dict[str, np.ndarray]) -> np.ndarray:
    """The matrix that ``form`` executes, features beyond those of the linear cut off."""
    total = np.zeros((form.out_features, form.in_features))
    for window in form.windows:
        block = merged(mixture, window, cores.__getitem__)
        assert block.dtype == np.float64 and block.shape == (window.rows, window.columns)
        executed = np.kron(np.kron(np.eye(window.left), block), np.eye(window.right))
        assert executed.shape == (window.out_size, window.in_size)
        rows, columns = min(form.out_features, window.out_size), min(form.in_features, window.in_size)
        total[:rows, :columns] += executed[:rows, :columns]
    return total


@pytest.mark.parametrize("shape", CASES)
def test_every_form_is_the_matrix(shape: tuple) -> None:
    linear, cores, expected = case(*shape)
    mixture = Mixture.of(linear)
    forms = mixt_forms(linear)
    assert forms[0].name == "branches" and forms[-1].name == "dense"
    for form in forms:
        np.testing.assert_allclose(matrix_of(form, mixture, cores), expected, atol=1e-12, err_msg=form.name)


@pytest.mark.parametrize("shape", [shape for shape in CASES if shape[-1]])
def test_the_uncropped_forms_are_the_padded_matrix(shape: tuple) -> None:
    linear, cores, expected = case(*shape)
    mixture = Mixture.of(linear)
    cropped = {form.name: form for form in mixt_forms(linear)}
    for form in mixt_forms(linear, crop=False):
        padded = matrix_of(form, mixture, cores)
        assert padded.shape == mixture.padded_features and not form.padded
        np.testing.assert_allclose(padded[: shape[1], : shape[0]], expected, atol=1e-12)
        if form.name in cropped:
            assert cropped[form.name].macs <= form.macs and cropped[form.name].elements <= form.elements


@pytest.mark.parametrize("shape", [shape for shape in CASES if not shape[-1]])
def test_costs_are_those_of_the_mathematics(shape: tuple) -> None:
    n_in, n_out, terms, bond, _ = shape
    linear = case(*shape)[0]
    for form in mixt_forms(linear):
        assert sum(form.partition) == terms and len(form.partition) == len(form.windows)
        expected = sum(n_in * n_out * bond ** (count - terms) for count in form.partition)
        assert form.macs == expected
        assert form.elements * bond ** (2 * terms) == sum(n_in * n_out * bond ** (2 * c) for c in form.partition)
        assert form.nbytes(2) * 2 == form.nbytes(4) == 4 * form.elements
    by_name = {form.name: form for form in mixt_forms(linear)}
    assert by_name["branches"].macs == macs(linear) and by_name["branches"].elements == linear.params
    assert by_name["dense"].macs == by_name["dense"].elements == n_in * n_out
    assert by_name["branches"].transposes == 2 * (terms - 1) and by_name["dense"].transposes == 0
    assert by_name["branches-left"].transposes == 2


def test_names() -> None:
    names = {form.name: form.partition for form in mixt_forms(build.mixt("linear", 64, 64, 5))}
    assert names["pairs"] == (2, 2, 1) and names["merged:3"] == (3, 2) and names["merged:4"] == (4, 1)
    assert names["merged:2+1+2"] == (2, 1, 2) and names["dense"] == (5,) and names["branches"] == (1,) * 5
    two = {form.name for form in mixt_forms(build.mixt("linear", 64, 64, 2))}
    assert two == {"branches", "branches-left", "dense"}


def test_many_terms_have_few_forms() -> None:
    forms = mixt_forms(build.mixt("linear", 2**12, 2**12, 12))
    assert 5 <= len(forms) < 40
    assert all(len(form.windows) <= 6 or form.name == "branches" for form in forms)


def test_llama_padded_costs() -> None:
    linear = build.mixt("linear", 4096, 11008, 4, paper_padding=True)
    padded = {form.name: form for form in mixt_forms(linear, crop=False)}["branches"]
    assert padded.macs == 4096 * 16384 // 2
    assert {form.name: form for form in mixt_forms(linear)}["pairs"].macs < padded.macs


def test_what_is_no_mixture_has_no_forms() -> None:
    for linear in (
        build.low_rank("linear", 24, 16, 3),
        build.kronecker("linear", (4, 6), (4, 4), 2),
        build.mixt("linear", 24, 16, 1),
        build.with_sparse(build.mixt("linear", 24, 16, 3), 5),
    ):
        assert mixt_forms(linear) == []
    good = build.mixt("linear", 24, 16, 3)
    first, *rest = good.branches
    assert mixt_forms(replace(good, branches=(replace(first, scale=0.5), *rest))) == []
    assert mixt_forms(replace(good, branches=good.branches[:2])) == []
    assert mixt_forms(replace(good, branches=(first, first, *rest))) == []


def test_a_mixture_is_recognised_in_another_spelling() -> None:
    """Branches in another order, cores stored (in, out), spectators as several modes, one core shared."""
    shared = Core(TensorRef("shared", (6, 4), "float32"), ("p", "q"))
    other = Core(TensorRef("other", (4, 6), "float32"), ("q", "p"))
    spectators = (("s", 2), ("t", 2))
    branches = (
        Branch((*spectators, ("p", 6)), (*spectators, ("q", 4)), (shared,), scale=0.25),
        Branch((("p", 6), *spectators), (("q", 4), *spectators), (shared,), scale=0.25),
        Branch((("s", 2), ("p", 6), ("t", 2)), (("s", 2), ("q", 4), ("t", 2)), (other,), scale=0.25),
    )
    linear = FactorizedLinear("linear", 24, 16, branches)
    mixture = Mixture.of(linear)
    assert mixture is not None and [term.tensor for term in mixture.terms] == ["shared", "other", "shared"]
    assert mixture.stored_elements == 48
    rng = np.random.default_rng(5)
    cores = {"shared": rng.standard_normal((6, 4)), "other": rng.standard_normal((4, 6))}
    middle = np.kron(np.kron(np.eye(2), cores["other"]), np.eye(2))
    expected = (np.kron(cores["shared"].T, np.eye(4)) + middle + np.kron(np.eye(4), cores["shared"].T)) / 4
    for form in mixt_forms(linear):
        np.testing.assert_allclose(matrix_of(form, mixture, cores), expected, atol=1e-12)
