"""The torch module that executes the IR, against matrices built without the IR's labels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mixt_export.errors import NetworkError
from mixt_export.network import Branch, Core, FactorizedLinear, TensorRef, build
from mixt_export.reference.linear import FactorizedLinear as TorchLinear
from tests.network.cases import CASES, SPARSE_CASES, Case, identity, random_values


def torch_linear(linear: FactorizedLinear, values: dict[str, np.ndarray]) -> TorchLinear:
    made: dict[str, torch.nn.Parameter] = {}

    def load(name: str) -> torch.nn.Parameter:
        return made.setdefault(name, torch.nn.Parameter(torch.from_numpy(values[name]), requires_grad=False))

    return TorchLinear(linear, load, lambda name: torch.from_numpy(values[name].astype(np.int64)))


@pytest.mark.parametrize("case", CASES + SPARSE_CASES, ids=identity)
@pytest.mark.parametrize("shape", [(2, 3), (2, 500)], ids=["few tokens", "many"])
def test_every_structure_computes_its_matrix(case: Case, shape: tuple[int, int]) -> None:
    values = random_values(case.linear, 3)
    x = np.random.default_rng(4).standard_normal((*shape, case.linear.in_features))
    expected = x @ case.matrix(values).T
    if case.linear.bias is not None:
        expected = expected + values[case.linear.bias.name]
    found = torch_linear(case.linear, values)(torch.from_numpy(x)).numpy()
    assert found.shape == (*shape, case.linear.out_features)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("side", "index"), [("rows", 5), ("rows", -1), ("cols", 4), ("cols", -2)])
def test_sparse_indices_outside_the_matrix_are_refused(side: str, index: int) -> None:
    """Torch itself would take a negative column from the end and compute something."""
    linear = build.with_sparse(build.low_rank("linear", 4, 5, 2, dtype="float64"), 3)
    values = random_values(linear, 0) | {f"linear.sparse.{which}": np.array([0, 1, 2]) for which in ("rows", "cols")}
    torch_linear(linear, values)
    values[f"linear.sparse.{side}"][1] = index
    with pytest.raises(NetworkError, match=rf"indices 0..{3 if side == 'cols' else 4} in .*{side}', found {index}"):
        torch_linear(linear, values)


def test_a_tensor_named_twice_is_one_parameter() -> None:
    ref = TensorRef("shared", (4, 4), "float64")
    branch = Branch((("i", 4),), (("o", 4),), (Core(ref, ("i", "r")), Core(ref, ("r", "o"))), scale=0.5)
    linear = FactorizedLinear("twice", 4, 4, (branch, branch))
    values = random_values(linear, 0)
    module = torch_linear(linear, values)
    assert len(list(module.parameters())) == 1
    x = np.random.default_rng(1).standard_normal((5, 4))
    expected = x @ values["shared"] @ values["shared"]
    np.testing.assert_allclose(module(torch.from_numpy(x)).numpy(), expected, rtol=1e-12, atol=1e-12)


def test_gradients_do_not_depend_on_how_many_tokens_pass() -> None:
    """Few tokens go through the cores, many through their matrix: the gradients of the cores add up alike."""
    linear = build.tensor_train("train", (3, 4, 2), (2, 5, 3), (4, 3), dtype="float64")
    values = random_values(linear, 5)
    x = torch.from_numpy(np.random.default_rng(6).standard_normal((400, 24)))
    gradients = []
    for parts in (x.split(2), (x,)):
        module = torch_linear(linear, values).requires_grad_(True)
        for part in parts:
            module(part).square().sum().backward()
        gradients.append([core.grad for core in module.cores])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_low_rank_never_builds_the_dense_matrix() -> None:
    """2^20 features on each side: the dense matrix would be 8 TB."""
    wide = 1 << 20
    linear = FactorizedLinear(
        "wide",
        wide,
        wide,
        (
            Branch(
                (("i", wide),),
                (("o", wide),),
                (
                    Core(TensorRef("a", (wide, 1), "float64"), ("i", "r")),
                    Core(TensorRef("b", (1, wide), "float64"), ("r", "o")),
                ),
            ),
        ),
    )
    module = torch_linear(linear, {"a": np.ones((wide, 1)), "b": np.full((1, wide), 2.0)})
    assert torch.equal(
        module(torch.ones(1, wide, dtype=torch.float64)), torch.full((1, wide), 2.0 * wide, dtype=torch.float64)
    )
