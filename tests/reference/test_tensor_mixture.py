"""MixT in torch against Kronecker products in numpy float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mixt_export.errors import NetworkError
from mixt_export.network import FactorizedLinear, build
from mixt_export.reference import tensor_mixture
from mixt_export.reference.linear import FactorizedLinear as GenericLinear
from mixt_export.reference.linear import linear_module
from mixt_export.reference.tensor_mixture import MixTLinear, MixTShape, dense_is_cheaper

#: in, out, terms, bond, padded
SIZES = [
    (48, 32, 2, 2, False),
    (24, 56, 3, 2, False),
    (40, 24, 4, 2, False),
    (48, 112, 5, 2, False),
    (36, 18, 2, 3, False),
    (27, 54, 3, 3, False),
    (48, 20, 3, 2, True),
    (13, 40, 4, 2, True),
    (20, 33, 3, 3, True),
    (17, 17, 5, 2, True),
    (5, 7, 1, 2, False),
]


def oracle(shape: MixTShape, cores: list[np.ndarray]) -> np.ndarray:
    """The matrix from the definition."""
    total = np.zeros(())
    for k, core in enumerate(cores):
        left, right = np.eye(shape.bond**k), np.eye(shape.bond ** (shape.terms - 1 - k))
        total = total + np.kron(np.kron(left, core), right)
    return shape.scale * total[: shape.out_features, : shape.in_features]


def oracle_traces(shape: MixTShape, gradient: np.ndarray) -> list[np.ndarray]:
    """Gradients of the cores: the derivative of the definition by every element, one basis matrix at a time."""
    found = []
    for k in range(shape.terms):
        left, right = np.eye(shape.bond**k), np.eye(shape.bond ** (shape.terms - 1 - k))
        core = np.zeros(shape.core_shape)
        for index in np.ndindex(*shape.core_shape):
            basis = np.zeros(shape.core_shape)
            basis[index] = shape.scale
            whole = np.kron(np.kron(left, basis), right)[: shape.out_features, : shape.in_features]
            core[index] = (whole * gradient).sum()
        found.append(core)
    return found


def made(size: tuple[int, int, int, int, bool], seed: int = 0) -> tuple[MixTShape, list[torch.Tensor]]:
    in_features, out_features, terms, bond, padded = size
    shape = MixTShape(in_features, out_features, terms, bond, padded, scale=1 / terms)
    generator = torch.Generator().manual_seed(seed)
    cores = [
        torch.randn(shape.core_shape, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(terms)
    ]
    return shape, cores


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_both_routes_and_their_gradients_equal_the_definition(size: tuple[int, int, int, int, bool]) -> None:
    shape, cores = made(size)
    arrays = [core.detach().numpy() for core in cores]
    matrix = oracle(shape, arrays)
    rng = np.random.default_rng(1)
    x, dy = rng.standard_normal((2, 3, shape.in_features)), rng.standard_normal((2, 3, shape.out_features))
    traces = oracle_traces(shape, np.einsum("bto,bti->oi", dy, x))
    np.testing.assert_allclose(tensor_mixture.densify(cores, shape).detach().numpy(), matrix, rtol=0, atol=1e-12)
    for route in (
        lambda given: tensor_mixture.apply(given, cores, shape),
        lambda given: given @ tensor_mixture.densify(cores, shape).mT,
    ):
        given = torch.from_numpy(x).requires_grad_()
        y = route(given)
        dx, *found = torch.autograd.grad(y, [given, *cores], torch.from_numpy(dy))
        np.testing.assert_allclose(y.detach().numpy(), x @ matrix.T, rtol=0, atol=1e-12)
        np.testing.assert_allclose(dx.numpy(), dy @ matrix, rtol=0, atol=1e-12)
        for core, expected in zip(found, traces, strict=True):
            np.testing.assert_allclose(core.numpy(), expected, rtol=0, atol=2e-12)


@pytest.mark.parametrize("size", [(8, 12, 3, 2, False), (9, 5, 2, 3, True)], ids=str)
def test_gradcheck(size: tuple[int, int, int, int, bool]) -> None:
    shape, cores = made(size)
    x = torch.randn(4, shape.in_features, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *cores: tensor_mixture.apply(x, cores, shape), (x, *cores))
    assert torch.autograd.gradcheck(lambda *cores: tensor_mixture.densify(cores, shape), tuple(cores))


def test_only_what_needs_a_gradient_gets_one() -> None:
    shape, cores = made((24, 56, 3, 2, False))
    cores[1].requires_grad_(False)
    for y in (
        tensor_mixture.apply(torch.ones(2, 24, dtype=torch.float64), cores, shape),
        tensor_mixture.densify(cores, shape),
    ):
        torch.autograd.backward(y.sum())
    assert cores[0].grad is not None
    assert cores[1].grad is None


def linear_of(size: tuple[int, int, int, int, bool], bias: bool = False) -> FactorizedLinear:
    in_features, out_features, terms, bond, padded = size
    return build.mixt(
        "w", in_features, out_features, terms, bond=bond, paper_padding=padded, dtype="float64", bias=bias
    )


def loader(linear: FactorizedLinear, seed: int = 0) -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {
        ref.name: torch.nn.Parameter(torch.randn(ref.shape, dtype=torch.float64, generator=generator))
        for ref in linear.tensors()
    }


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_shape_is_recognised_in_the_ir(size: tuple[int, int, int, int, bool]) -> None:
    shape = MixTShape.of(linear_of(size))
    assert shape is not None
    assert (shape.in_features, shape.out_features, shape.terms) == size[:3]
    assert shape.splits == [(branch.in_modes[0][1], branch.in_modes[2][1]) for branch in linear_of(size).branches]
    assert shape.scale == 1 / size[2]


def test_other_networks_are_not_taken_for_mixt() -> None:
    mixt = linear_of((48, 32, 3, 2, False))
    shared = replace(mixt.branches[1], cores=(replace(mixt.branches[1].cores[0], tensor=mixt.core_tensors()[0]),))
    others = [
        build.low_rank("w", 48, 32, 4),
        build.kronecker("w", (4, 12), (8, 4), 2),
        replace(mixt, branches=mixt.branches[::-1]),
        replace(mixt, branches=mixt.branches[:2]),
        replace(mixt, branches=(*mixt.branches[:2], replace(mixt.branches[2], scale=1.0))),
        replace(mixt, branches=(mixt.branches[0], shared, mixt.branches[2])),
    ]
    assert [MixTShape.of(other) for other in others] == [None] * len(others)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("size", [(24, 56, 3, 2, False), (13, 40, 4, 2, True)], ids=str)
def test_the_module_computes_what_the_generic_one_does(
    size: tuple[int, int, int, int, bool], dense: bool, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_mixture, "dense_is_cheaper", lambda *_: dense)
    linear = linear_of(size, bias)
    values = loader(linear)
    module = linear_module(linear, values.__getitem__, lambda name: values[name].data)
    assert isinstance(module, MixTLinear)
    generic = GenericLinear(linear, values.__getitem__, lambda name: values[name].data)
    x = torch.randn(2, 5, linear.in_features, dtype=torch.float64)
    torch.testing.assert_close(module(x), generic(x), rtol=1e-12, atol=1e-12)
    single = module.float()(x.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), generic(x.float()).double(), rtol=1e-4, atol=1e-4)


def test_training_builds_the_matrix_and_decoding_does_not() -> None:
    for size in ((576, 576, 4), (576, 1536, 2), (4096, 4096, 2)):
        shape = MixTShape(*size)
        assert [dense_is_cheaper(shape, rows) for rows in (1, 4096)] == [False, True]


def test_decoding_never_builds_the_matrix_of_a_wide_linear() -> None:
    """2^18 features on each side: the dense matrix would be 256 GiB."""
    shape = MixTShape(1 << 18, 1 << 18, 17, scale=1 / 17)
    module = MixTLinear(shape, [torch.nn.Parameter(torch.ones(shape.core_shape)) for _ in range(17)])
    y = module(torch.ones(1, 1 << 18))
    torch.testing.assert_close(y, torch.full_like(y, 4.0))


def test_no_rows() -> None:
    shape, cores = made((24, 56, 3, 2, False))
    assert tensor_mixture.apply(torch.zeros(0, 24, dtype=torch.float64), cores, shape).shape == (0, 56)


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="does not divide"):
        MixTShape(20, 24, 4)
    shape, cores = made((24, 56, 3, 2, False))
    with pytest.raises(ValueError, match="3 cores"):
        MixTLinear(shape, [torch.nn.Parameter(core.detach()) for core in cores[:2]])
    with pytest.raises(NetworkError):
        build.mixt("w", 20, 24, 4)
