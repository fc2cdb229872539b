"""Orders of hidden channels: the energy they claim against dense least squares, and what they must not change."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mixt_export.compression import Settings, compress, permutation
from mixt_export.compression.permutation import GATED_MLP, ffn_permutation, permute_block, permute_ffn
from mixt_export.errors import CheckpointError
from mixt_export.network import build
from mixt_export.reference import load_reference
from mixt_export.reference.tensor_mixture import MixTShape
from tests.tiny import write_tiny


def captured(weight: np.ndarray, gram: np.ndarray, terms: int, bond: int) -> float:
    """Share of tr(W G Wᵀ) that the best MixT keeps: dense least squares over all entries of all cores."""
    out_features, in_features = weight.shape
    spectators = bond ** (terms - 1)
    height, width = out_features // spectators, in_features // spectators
    root = np.linalg.cholesky(gram)
    columns = []
    for k in range(terms):
        for row in range(height):
            for column in range(width):
                core = np.zeros((height, width))
                core[row, column] = 1.0
                full = np.kron(np.kron(np.eye(bond**k), core), np.eye(bond ** (terms - 1 - k)))
                columns.append((full @ root).ravel())
    design, wanted = np.stack(columns, 1), (weight @ root).ravel()
    solution, *_ = np.linalg.lstsq(design, wanted, rcond=None)
    return 1.0 - float(np.square(wanted - design @ solution).sum() / np.square(wanted).sum())


def random_problem(hidden: int, features: int, seed: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(hidden, features, generator=generator) for _ in range(2)]
    grams = []
    for _ in range(2):
        x = torch.randn(4 * features, features, generator=generator) @ torch.randn(
            features, features, generator=generator
        )
        grams.append(x.T @ x / len(x))
    return weights, grams


def total(weights: list[torch.Tensor], grams: list[torch.Tensor], order: torch.Tensor, terms: int, bond: int) -> float:
    return sum(
        captured(weight[order].double().numpy(), gram.double().numpy(), terms, bond)
        for weight, gram in zip(weights, grams, strict=True)
    )


@pytest.mark.parametrize(("hidden", "features", "terms", "bond"), [(40, 12, 2, 2), (48, 8, 3, 2), (36, 9, 2, 3)])
def test_more_energy_is_captured(hidden: int, features: int, terms: int, bond: int) -> None:
    weights, grams = random_problem(hidden, features, 0)
    order = ffn_permutation(weights, grams, MixTShape(features, hidden, terms, bond))
    assert sorted(order.tolist()) == list(range(hidden))
    before = total(weights, grams, torch.arange(hidden), terms, bond)
    assert total(weights, grams, order, terms, bond) > before + 0.02


@pytest.mark.parametrize(("terms", "bond"), [(2, 2), (3, 2), (2, 3)])
def test_hidden_structure_survives_and_shuffled_structure_is_partly_found(terms: int, bond: int) -> None:
    """A weight that is MixT already stays; shuffled, an order is found that captures most of what was lost."""
    spectators = bond ** (terms - 1)
    hidden, features = 4 * spectators**2, 3 * spectators
    generator = torch.Generator().manual_seed(1)
    weights, grams = [], [torch.eye(features)] * 2
    for _ in range(2):
        weight = torch.zeros(hidden, features)
        for k in range(terms):
            core = torch.randn(hidden // spectators, features // spectators, generator=generator)
            weight += torch.kron(torch.kron(torch.eye(bond**k), core), torch.eye(bond ** (terms - 1 - k)))
        weights.append(weight)
    shape = MixTShape(features, hidden, terms, bond)
    assert torch.equal(ffn_permutation(weights, grams, shape), torch.arange(hidden))
    shuffle = torch.randperm(hidden, generator=generator)
    shuffled = [weight[shuffle] for weight in weights]
    order = ffn_permutation(shuffled, grams, shape)
    lost = 2.0 - total(shuffled, grams, torch.arange(hidden), terms, bond)
    assert 2.0 - total(shuffled, grams, order, terms, bond) < 0.85 * lost


def test_deterministic_and_unharmed_arguments() -> None:
    weights, grams = random_problem(40, 12, 2)
    kept = [tensor.clone() for tensor in (*weights, *grams)]
    shape = MixTShape(12, 40, 2)
    assert torch.equal(ffn_permutation(weights, grams, shape), ffn_permutation(weights, grams, shape))
    assert all(torch.equal(one, other) for one, other in zip((*weights, *grams), kept, strict=True))


@pytest.mark.parametrize("shape", [MixTShape(12, 40, 2, padded=True), MixTShape(12, 104, 3)], ids=["padded", "13 * 8"])
def test_no_order_where_none_fits(shape: MixTShape) -> None:
    weights, grams = random_problem(shape.out_features, 12, 3)
    assert torch.equal(ffn_permutation(weights, grams, shape), torch.arange(shape.out_features))


def test_a_gram_that_is_not_finite_is_refused() -> None:
    weights, grams = random_problem(40, 12, 4)
    grams[1][0, 0] = torch.inf
    with pytest.raises(CheckpointError, match="not finite"):
        ffn_permutation(weights, grams, MixTShape(12, 40, 2))


def test_the_function_of_the_mlp_stays() -> None:
    torch.manual_seed(5)
    gate, up, down = nn.Linear(12, 40), nn.Linear(12, 40), nn.Linear(40, 12)
    parts = nn.ModuleList([gate, up, down]).double()
    shared = copy.deepcopy(parts.state_dict())
    views = [gate.weight, up.bias, down.weight]
    x = torch.randn(3, 5, 12, dtype=torch.float64)

    def mlp() -> torch.Tensor:
        return down(nn.functional.silu(gate(x)) * up(x))

    before = mlp()
    order = torch.randperm(40)
    permute_ffn(gate, up, down, order)
    assert not torch.equal(gate.weight, shared["0.weight"])
    torch.testing.assert_close(mlp(), before, rtol=1e-12, atol=1e-12)
    assert torch.equal(views[0], shared["0.weight"])  # the old parameters, which others may share, are untouched
    assert torch.equal(views[1], shared["1.bias"])
    assert torch.equal(views[2], shared["2.weight"])


class Mlp(nn.Module):
    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        sizes = {"gate_proj": (12, 40), "up_proj": (12, 40), "down_proj": (40, 12)}
        self.mlp = nn.ModuleDict({name: nn.Linear(*size, bias=bias) for name, size in sizes.items()})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.mlp["down_proj"](nn.functional.silu(self.mlp["gate_proj"](x)) * self.mlp["up_proj"](x))
        return y


def test_a_block_keeps_its_function_and_its_neurons() -> None:
    torch.manual_seed(6)
    block = Mlp()
    before = copy.deepcopy(block)
    linears = {
        name: build.mixt(name, 40 if "down" in name else 12, 12 if "down" in name else 40, 2) for name in GATED_MLP
    }
    inputs = [torch.randn(50, 12) @ torch.randn(12, 12) for _ in range(3)]
    assert permute_block(block, linears, inputs)
    weights = [module.mlp["up_proj"].weight.detach() for module in (before, block)]
    assert not torch.equal(*weights)
    assert sorted(map(tuple, weights[0].tolist())) == sorted(map(tuple, weights[1].tolist()))
    torch.testing.assert_close(block(inputs[0]), before(inputs[0]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("why", ["down stays", "biases", "unlike", "padded", "low rank", "too large"])
def test_blocks_that_are_left_alone(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(7)
    block = Mlp(bias=why == "biases")
    padded = why == "padded"
    linears = {
        name: build.mixt(name, 40 if "down" in name else 12, 12 if "down" in name else 40, 2, paper_padding=padded)
        for name in GATED_MLP
    }
    changed = {
        "down stays": lambda: linears.pop(GATED_MLP[2]),
        "unlike": lambda: linears.update({GATED_MLP[1]: build.mixt(GATED_MLP[1], 12, 40, 3)}),
        "low rank": lambda: linears.update({name: build.low_rank(name, 12, 40, 2) for name in GATED_MLP[:2]}),
    }
    changed.get(why, lambda: None)()
    if why == "too large":
        monkeypatch.setattr(permutation, "MOST_WORK", 4 * 40 * 12**2 - 1)
    kept = copy.deepcopy(block.state_dict())

    def unread() -> Iterator[torch.Tensor]:
        raise AssertionError("inputs were read though they are of no use")
        yield

    assert not permute_block(block, linears, unread())
    assert all(torch.equal(kept[name], tensor) for name, tensor in block.state_dict().items())


def test_compress_reorders_unless_told_not_to(tmp_path: Path) -> None:
    """Gate and up come closer to their outputs, and the written model is the better one as a whole."""
    model = write_tiny(tmp_path / "model", num_hidden_layers=1)
    text = tmp_path / "text.txt"
    text.write_text("".join(np.random.default_rng(0).choice(list("abcdefgh "), 3000)), encoding="utf-8")
    tokens = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(0))
    wanted = load_reference(model)(tokens).logits
    gate_and_up, whole = {}, {}
    for permute in (True, False):
        out = tmp_path / str(permute)
        report = compress(
            model,
            out,
            method="mixt",
            blocks="all",
            include=["mlp"],
            n_tensors=2,
            calib=[text],
            settings=Settings(windows=24, window=64),
            refine_steps=0,
            controls=False,
            permute=permute,
        )
        assert report.recipe["permute"] is permute
        gate_and_up[permute] = sum(layer.output_error for layer in report.layers if "down" not in layer.name)
        whole[permute] = float((load_reference(out)(tokens).logits - wanted).square().mean())
    assert gate_and_up[True] < 0.97 * gate_and_up[False]
    assert whole[True] < whole[False]
