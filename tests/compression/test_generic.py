"""MixT in any module: what replaces a linear against an independent least squares, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mixt_export.compression.generic import GenericReport, refine_replaced, replace_linears
from mixt_export.compression.settings import Settings
from mixt_export.errors import MixtError, UnsupportedError, UsageError
from mixt_export.reference.linear import FactorizedLinear
from mixt_export.reference.tensor_mixture import MixTLinear

EXACT = Settings(term_ridge=1e-9, term_sweeps=400)


class Toy(nn.Module):
    """Two linears on one input, a sum, a third; one that never runs; a mask argument that is only carried along."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(24, 40)
        self.right = nn.Linear(24, 40, bias=False)
        self.tail = nn.ModuleDict({"out": nn.Linear(40, 12)})
        self.idle = nn.Linear(8, 8)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        hidden = self.dropout(torch.tanh(self.left(x)) * self.right(x))
        return {"y": self.tail["out"](hidden)}


@pytest.fixture
def toy() -> Toy:
    torch.manual_seed(0)
    return Toy()


def batches(count: int = 6, seed: int = 1) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(24, 24, generator=generator)
    return [{"x": torch.randn(3, 7, 24, generator=generator) @ mix} for _ in range(count)]


def least_error(weight: np.ndarray, x: np.ndarray, shifted: np.ndarray, terms: int) -> float:
    """Smallest mean over rows of ||W x - W' x'||² / ||W x||² over all MixT W', by dense least squares."""
    out_features, in_features = weight.shape
    spectators = 2 ** (terms - 1)
    height, width = out_features // spectators, in_features // spectators
    y = x @ weight.T
    scale = 1.0 / np.linalg.norm(y, axis=1)
    columns = []
    for k in range(terms):
        for row in range(height):
            for column in range(width):
                core = np.zeros((height, width))
                core[row, column] = 1.0
                basis = np.kron(np.kron(np.eye(2**k), core), np.eye(2 ** (terms - 1 - k)))
                columns.append(((shifted @ basis.T) * scale[:, None]).ravel())
    design, wanted = np.stack(columns, 1), (y * scale[:, None]).ravel()
    solution, *_ = np.linalg.lstsq(design, wanted, rcond=None)
    return float(np.square(wanted - design @ solution).sum() / len(x))


def rows(*parts: torch.Tensor) -> np.ndarray:
    return np.concatenate([part.detach().double().reshape(-1, part.shape[-1]).numpy() for part in parts])


@pytest.mark.parametrize("terms", [2, 3])
def test_reaches_the_least_squares_optimum(toy: Toy, terms: int) -> None:
    inputs = batches()
    weight, bias = toy.left.weight.detach().double().numpy(), toy.left.bias.detach().clone()
    report = replace_linears(toy, ["left"], inputs, n_tensors=terms, settings=EXACT)
    x = rows(*(batch["x"] for batch in inputs))
    assert report.linears[0].error == pytest.approx(least_error(weight, x, x, terms), rel=1e-4)
    assert isinstance(toy.left, MixTLinear)
    assert torch.equal(toy.left.bias, bias)
    assert report.params_after == terms * 24 * 40 // 4 ** (terms - 1)
    assert report.params_before == 24 * 40
    y, found = x @ weight.T, rows(toy.left(torch.from_numpy(x).float()) - bias)
    measured = (np.square(y - found).sum(1) / np.square(y).sum(1)).mean()
    assert measured == pytest.approx(report.linears[0].error, rel=1e-4)


def test_sequential_fits_to_the_inputs_that_the_replacement_sees(toy: Toy) -> None:
    inputs = batches()
    dense = copy.deepcopy(toy).eval()
    report = replace_linears(
        toy, r"left|right|tail\.out", inputs, n_tensors={"out": 2, "left": 3, "right": 3}, settings=EXACT
    )
    assert [linear.name for linear in report.linears] == ["left", "right", "tail.out"]
    assert [linear.terms for linear in report.linears] == [3, 3, 2]
    toy.eval()
    with torch.no_grad():
        before = [torch.tanh(dense.left(b["x"])) * dense.right(b["x"]) for b in inputs]
        after = [torch.tanh(toy.left(b["x"])) * toy.right(b["x"]) for b in inputs]
    weight = dense.tail["out"].weight.detach().double().numpy()
    expected = least_error(weight, rows(*before), rows(*after), 2)
    assert report.linears[2].error == pytest.approx(expected, rel=1e-4)
    assert expected > 1.05 * least_error(weight, rows(*before), rows(*before), 2)


def test_without_sequential_the_original_inputs_count(toy: Toy) -> None:
    inputs = batches()
    dense = copy.deepcopy(toy).eval()
    report = replace_linears(toy, "left|right|out", inputs, n_tensors=2, sequential=False, settings=EXACT)
    with torch.no_grad():
        hidden = rows(*(torch.tanh(dense.left(b["x"])) * dense.right(b["x"]) for b in inputs))
    weight = dense.tail["out"].weight.detach().double().numpy()
    assert report.linears[2].error == pytest.approx(least_error(weight, hidden, hidden, 2), rel=1e-4)


def test_only_counted_rows_count(toy: Toy) -> None:
    inputs = batches()
    for number, batch in enumerate(inputs):
        batch["mask"] = torch.zeros(3, 7, dtype=torch.int64)
        batch["mask"][:, : 3 + number % 3] = 1
    weight = toy.left.weight.detach().double().numpy()
    report = replace_linears(toy, ["left"], inputs, n_tensors=2, counted="mask", settings=EXACT)
    kept = rows(*(batch["x"][batch["mask"].bool()] for batch in inputs))
    assert report.linears[0].error == pytest.approx(least_error(weight, kept, kept, 2), rel=1e-4)


def test_low_rank_of_no_more_parameters(toy: Toy) -> None:
    inputs = batches()
    dense = copy.deepcopy(toy)
    report = replace_linears(
        toy, ["left"], inputs, n_tensors=2, method="low-rank", settings=Settings(anchor_damping=1e-9)
    )
    assert isinstance(toy.left, FactorizedLinear)
    rank = 480 // 64
    assert report.params_after == rank * 64
    x = rows(*(batch["x"] for batch in inputs))
    y = x @ dense.left.weight.detach().double().numpy().T
    weighted, wanted = x / np.linalg.norm(y, axis=1)[:, None], y / np.linalg.norm(y, axis=1)[:, None]
    image = weighted @ np.linalg.lstsq(weighted, wanted, rcond=None)[0]
    tail = np.square(np.linalg.svd(image, compute_uv=False)[rank:]).sum() / len(x)
    assert report.linears[0].error == pytest.approx(tail, rel=1e-4)


def output_error(module: nn.Module, dense: nn.Module, inputs: list[dict[str, Any]]) -> float:
    """Mean over inputs of the mean over rows of ||o - y||² / ||y||², float64; both in eval mode afterwards."""
    module.eval(), dense.eval()
    errors = []
    for batch in inputs:
        with torch.no_grad():
            found, wanted = rows(module(**batch)["y"]), rows(dense(**batch)["y"])
        errors.append((np.square(found - wanted).sum(1) / np.square(wanted).sum(1)).mean())
    return float(np.mean(errors))


def test_refinement_lowers_the_error_of_the_output_and_leaves_the_rest(toy: Toy) -> None:
    every = batches(48)
    inputs, unseen = every[:24], every[24:]
    dense = copy.deepcopy(toy)
    plain = copy.deepcopy(toy)
    replace_linears(plain, ["left", "tail.out"], inputs, n_tensors=2)
    toy.train()
    toy.right.weight.requires_grad_(False)
    report = replace_linears(
        toy, ["left", "tail.out"], inputs, n_tensors=2, refine_steps=60, matrix_rate=1e-2, learning_rate=2e-2
    )
    assert toy.training
    assert toy.dropout.training
    assert [p.requires_grad for p in toy.right.parameters()] == [False]
    assert all(p.requires_grad and p.grad is None for p in toy.left.parameters())
    assert toy.idle.weight.requires_grad
    assert torch.equal(toy.right.weight, dense.right.weight)
    assert report.refined is not None
    # the last eighth of the inputs is held out: what is reported was measured there, and is what the module does
    assert report.refined[0] == pytest.approx(output_error(plain, dense, inputs[-3:]), rel=1e-4)
    assert report.refined[1] == pytest.approx(output_error(toy, dense, inputs[-3:]), rel=1e-4)
    assert report.refined[1] < report.refined[0]
    assert output_error(toy, dense, inputs) < 0.9 * output_error(plain, dense, inputs)
    assert output_error(toy, dense, unseen) < output_error(plain, dense, unseen)


def test_refinement_that_only_harms_changes_nothing(toy: Toy) -> None:
    plain = copy.deepcopy(toy)
    replace_linears(plain, "left|out", batches(), n_tensors=2)
    report = replace_linears(toy, "left|out", batches(), n_tensors=2, refine_steps=12, matrix_rate=5.0)
    assert report.refined is not None
    assert report.refined[0] == report.refined[1]
    assert all(torch.equal(value, toy.state_dict()[name]) for name, value in plain.state_dict().items())


@pytest.mark.parametrize("method", ["mixt", "low-rank"])
def test_refining_later_on_the_same_inputs_is_refining_at_once(toy: Toy, method: str) -> None:
    inputs, dense, later = batches(24), copy.deepcopy(toy), copy.deepcopy(toy)
    at_once = replace_linears(
        toy, "left|out", inputs, n_tensors=2, method=method, refine_steps=200, learning_rate=2e-2, seed=5
    )
    report = replace_linears(later, "left|out", inputs, n_tensors=2, method=method)
    report = refine_replaced(later, dense, report, inputs, steps=200, learning_rate=2e-2, seed=5)
    assert report == at_once
    assert report.refined is not None
    assert report.refined[1] < report.refined[0]
    assert all(torch.equal(value, toy.state_dict()[name]) for name, value in later.state_dict().items())


def test_one_input_is_trained_on_and_measured(toy: Toy) -> None:
    inputs, dense = batches(1), copy.deepcopy(toy)
    report = replace_linears(toy, "left|out", inputs, n_tensors=2, refine_steps=30)
    assert report.refined is not None
    assert report.refined[1] < report.refined[0]
    assert report.refined[1] == pytest.approx(output_error(toy, dense, inputs), rel=1e-4)


def test_only_counted_rows_are_refined(toy: Toy) -> None:
    inputs = batches(4)
    for batch in inputs:
        batch["mask"] = torch.ones(3, 7, dtype=torch.int64)
        batch["mask"][:, 4:] = 0
    spoiled = [{**batch, "x": batch["x"].clone()} for batch in inputs]
    for batch in spoiled:
        batch["x"][:, 4:] = torch.randn(3, 3, 24)
    dense, report = copy.deepcopy(toy), replace_linears(toy, "left|out", inputs, n_tensors=2, counted="mask")
    other = copy.deepcopy(toy)
    found = refine_replaced(toy, dense, report, inputs, steps=6, counted="mask")
    assert found.refined is not None
    assert refine_replaced(other, dense, report, spoiled, steps=6, counted="mask").refined == pytest.approx(
        found.refined, rel=1e-3
    )


def test_equal_arguments_give_equal_factors(toy: Toy) -> None:
    made = []
    for _ in range(2):
        again = copy.deepcopy(toy)
        replace_linears(again, "left|out", batches(), n_tensors=2, refine_steps=5, seed=3)
        made.append(again.state_dict())
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


def test_a_linear_that_runs_twice_is_fitted_to_both_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step = nn.Linear(8, 8, bias=False)

        def forward(self, x: torch.Tensor) -> tuple[str, torch.Tensor]:
            return "not a tensor", self.step(torch.relu(self.step(x)))

    torch.manual_seed(0)
    module = Twice()
    weight = module.step.weight.detach().double().numpy()
    x = torch.randn(50, 8)
    report = replace_linears(module, ["step"], [{"x": x}], n_tensors=2, sequential=False, settings=EXACT)
    first = x.double().numpy()
    both = np.concatenate([first, np.maximum(first @ weight.T, 0)])
    assert report.linears[0].error != pytest.approx(least_error(weight, first, first, 2), rel=1e-2)
    assert report.linears[0].params_after == 2 * 16
    # the second call reads what the untouched first call gave: nothing was replaced while moments were taken
    assert report.linears[0].error == pytest.approx(least_error(weight, both, both, 2), rel=1e-4)


REFUSED: list[tuple[dict[str, Any], type[MixtError], str]] = [
    ({"names": "middle"}, UsageError, "matches no nn.Linear"),
    ({"names": "("}, UsageError, "not a regular expression"),
    ({"names": ["tail"]}, UsageError, "'tail' is not the path of an nn.Linear"),
    ({"names": []}, UsageError, "no names"),
    ({"inputs": []}, UsageError, "no inputs"),
    (
        {"n_tensors": 5},
        UsageError,
        "as n_tensors 5 with bond 2 needs; n_tensors 4 fits, paper_padding pads them, a lin",
    ),
    ({"n_tensors": 1}, UsageError, "or leave linears that should stay dense out of names"),
    ({"n_tensors": {"right": 2}}, UsageError, "n_tensors right=…: matches none"),
    ({"bond": 1}, UsageError, "bond 1: the local dimension"),
    ({"method": "cur"}, UnsupportedError, "mixt, low-rank"),
    ({"names": ["left", "idle"]}, UnsupportedError, "idle: the module never runs"),
    ({"counted": "attention"}, UsageError, "no argument 'attention'"),
    ({"refine_steps": -1}, UsageError, "refine_steps is -1"),
    ({"refine_steps": 3, "matrix_rate": 0.0}, UsageError, "refine matrix rate is 0.0"),
    ({"refine_steps": 3, "learning_rate": -1.0}, UsageError, "refine learning rate is -1.0"),
]


@pytest.mark.parametrize(("wrong", "kind", "says"), REFUSED, ids=lambda value: str(value)[:30])
def test_refusals_leave_the_module_as_it_was(toy: Toy, wrong: dict[str, Any], kind: type, says: str) -> None:
    before = dict(toy.named_modules())
    arguments = {"names": ["left"], "inputs": batches(1), "n_tensors": 2, **wrong}
    with pytest.raises(kind) as caught:
        replace_linears(toy, arguments.pop("names"), arguments.pop("inputs"), **arguments)
    assert says in str(caught.value)
    assert "--" not in str(caught.value)
    assert dict(toy.named_modules()) == before


def spoilt(change: Callable[[Toy], object]) -> Toy:
    module = Toy()
    change(module)
    return module


def share(module: Toy) -> None:
    module.right = module.left


@pytest.mark.parametrize(
    ("module", "says"),
    [(spoilt(lambda toy: toy.double()), "float64"), (spoilt(share), "several paths")],
    ids=["float64", "shared"],
)
def test_linears_that_cannot_be_replaced(module: Toy, says: str) -> None:
    with pytest.raises(UnsupportedError, match=says):
        replace_linears(module, ["left"], batches(1))


def test_progress_and_interruption_restore_the_module(toy: Toy) -> None:
    class Stop:
        def task(self, name: str, total: int | None = None) -> Any:
            from contextlib import contextmanager

            @contextmanager
            def opened() -> Any:
                def advance(_count: int) -> None:
                    raise KeyboardInterrupt

                yield advance

            return opened()

    left = toy.left
    with pytest.raises(KeyboardInterrupt):
        replace_linears(toy, "left|right", batches(), n_tensors=2, progress=Stop())
    assert toy.left is left


def test_report_adds_up() -> None:
    torch.manual_seed(0)
    report = replace_linears(Toy(), "left|right", batches(), n_tensors=3)
    assert isinstance(report, GenericReport)
    assert report.params_before == 2 * 960
    assert report.params_after == 2 * 3 * 960 // 16
    assert report.refined is None


def test_replacements_train_if_the_originals_did(toy: Toy) -> None:
    toy.right.requires_grad_(False)
    replace_linears(toy, "left|right", batches(1), n_tensors=2)
    assert all(parameter.requires_grad for parameter in toy.left.parameters())
    assert not any(parameter.requires_grad for parameter in toy.right.parameters())
