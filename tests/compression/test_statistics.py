"""Block-by-block statistics against the whole model under autograd and one hook per linear."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mixt_export.checkpoints import open_checkpoint
from mixt_export.compression.blocks import BlockwiseModel
from mixt_export.compression.gather import FISHER, TRACES, Gatherer, Statistics
from mixt_export.compression.scratch import Scratch
from mixt_export.compression.settings import Settings
from mixt_export.compression.statistics import Gram, input_groups
from mixt_export.compression.statistics_cache import StatisticsCache
from mixt_export.errors import CheckpointError, UnsupportedError
from mixt_export.progress import SILENT
from mixt_export.reference import load_reference
from tests.tiny import FAMILIES, LINEARS, write_tiny

WINDOWS = np.random.default_rng(0).integers(0, 256, (5, 24))
SETTINGS = Settings(windows=5, window=24, fisher_windows=3, batch=2)


@contextmanager
def gathered(folder: Path, scratch: Path, gradients: str = FISHER) -> Iterator[Statistics]:
    model = BlockwiseModel(open_checkpoint(folder))
    scratch.mkdir()
    targets = {index: list(LINEARS) for index in range(model.blocks)}
    gatherer = Gatherer(model, targets, WINDOWS, SETTINGS, Scratch(scratch), SILENT, StatisticsCache(None), gradients)
    with gatherer.run() as statistics:
        yield statistics


def autograd(folder: Path, windows: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], float]:
    """Input Grams over all windows, Fisher matrices over the first ``windows``: whole model, one hook per linear."""
    model: Any = load_reference(folder, attn="eager")
    inputs: dict[str, list[torch.Tensor]] = {}
    outputs: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Any:
        def hear(_module: Any, given: Any, output: torch.Tensor) -> None:
            inputs.setdefault(name, []).append(given[0].detach().reshape(-1, given[0].shape[-1]))
            if output.requires_grad:
                output.retain_grad()
                outputs[name] = output

        return hear

    for name, module in model.named_modules():
        if name.endswith(LINEARS):
            module.register_forward_hook(hook(name))
    tokens = torch.from_numpy(WINDOWS)
    with torch.no_grad():
        model(tokens)
    grams = {name: x[0].double().T @ x[0].double() / x[0].shape[0] for name, x in inputs.items()}
    embedded = model.get_input_embeddings()(tokens[:windows]).requires_grad_(True)
    logits = model(inputs_embeds=embedded).logits
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]), tokens[:windows, 1:].reshape(-1), reduction="sum"
    )
    loss.backward()
    fisher = {}
    for name, output in outputs.items():
        assert output.grad is not None
        g = output.grad.reshape(-1, output.shape[-1]).double()
        fisher[name] = g.T @ g / len(g)
    return grams, fisher, loss.item() / (windows * (WINDOWS.shape[1] - 1))


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_equal_those_of_the_whole_model(tmp_path: Path, family: str) -> None:
    folder = write_tiny(tmp_path / "m", family, tied=family != "llama")
    grams, fisher, loss = autograd(folder, 3)
    assert len(fisher) == 21
    with gathered(folder, tmp_path / "s") as found:
        assert found.loss == pytest.approx(loss, rel=1e-5)
        shared = len(set(found._group.values()))
        assert shared == 3 * 4, "q, k and v share a Gram, gate and up do"
        for name, expected in fisher.items():
            gram, metric = found.gram(name), found.fisher(name)
            assert gram is not None
            assert metric is not None
            torch.testing.assert_close(gram.double(), grams[name], rtol=1e-4, atol=1e-5)
            scale = float(expected.abs().max())
            torch.testing.assert_close(metric.double() / scale, expected / scale, rtol=1e-3, atol=1e-5)
            assert found.trace(name) == pytest.approx(float(expected.trace()), rel=1e-4)


def test_traces_are_those_of_the_fisher_matrices_without_them(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "m")
    _, fisher, loss = autograd(folder, 3)
    with gathered(folder, tmp_path / "s", TRACES) as found:
        assert found.loss == pytest.approx(loss, rel=1e-5)
        for name, expected in fisher.items():
            assert found.fisher(name) is None
            assert found.trace(name) == pytest.approx(float(expected.trace()), rel=1e-4)


def test_sliding_windows_reach_the_blocks(tmp_path: Path) -> None:
    """A window of 4 tokens changes what later tokens see; the masks come from the model itself."""
    folder = write_tiny(tmp_path / "m", "mistral", sliding_window=4)
    grams, _, loss = autograd(folder, 3)
    name = "model.layers.2.mlp.down_proj"
    with gathered(folder, tmp_path / "s") as found:
        assert found.loss == pytest.approx(loss, rel=1e-5)
        gram = found.gram(name)
        assert gram is not None
        torch.testing.assert_close(gram.double(), grams[name], rtol=1e-4, atol=1e-5)


def test_logits_in_chunks_give_the_same_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = BlockwiseModel(open_checkpoint(write_tiny(tmp_path / "m")))
    hidden = torch.randn(2, 24, 48, generator=torch.Generator().manual_seed(0))
    whole, loss = model.loss_gradients(lambda window: hidden[window], WINDOWS[:2])
    monkeypatch.setattr("mixt_export.compression.blocks.LOGITS_AT_ONCE", 300 * 5)
    parts, again = model.loss_gradients(lambda window: hidden[window], WINDOWS[:2])
    # Sums of other lengths: elements that nearly cancel are off by more than their own last digits.
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5 * float(whole.abs().max()))
    assert again == pytest.approx(loss, rel=1e-6)
    assert float(whole[:, -1].abs().max()) == 0.0


def test_only_one_block_is_materialised(tmp_path: Path) -> None:
    model = BlockwiseModel(open_checkpoint(write_tiny(tmp_path / "m")))

    def real() -> int:
        return sum(not parameter.is_meta for parameter in model.model.parameters())

    assert real() == 0
    with model.block(1) as layer:
        assert real() == len(list(layer.parameters()))
        clone = model.clone(layer)
        first, second = layer.get_submodule("mlp.up_proj").weight, clone.get_submodule("mlp.up_proj").weight
        assert first is second
        clone.get_submodule("mlp.up_proj").weight = torch.nn.Parameter(torch.zeros(104, 48), requires_grad=False)
        assert float(layer.get_submodule("mlp.up_proj").weight.abs().max()) > 0
    model.embed(WINDOWS, np.empty((*WINDOWS.shape, 48), np.float32))
    assert real() == 0


def test_symmetric_grams_in_blocks_equal_plain_products() -> None:
    rng = torch.Generator().manual_seed(1)
    x, y = torch.randn(50, 800, generator=rng), torch.randn(50, 800, generator=rng)
    own, cross = Gram(800), Gram(800)
    for part in (slice(0, 7), slice(7, 50)):
        own.add(x[part])
        cross.add(x[part], y[part])
    torch.testing.assert_close(own.mean().float(), x.T @ x / 50, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cross.mean().float(), x.T @ y / 50, rtol=1e-4, atol=1e-5)
    assert torch.equal(own.mean(), own.mean().T)


def test_a_linear_outside_the_forward_pass_is_named() -> None:
    block = torch.nn.ModuleDict({"used": torch.nn.Linear(3, 3), "idle": torch.nn.Linear(3, 3)})
    with pytest.raises(UnsupportedError, match="idle"):
        input_groups(block, ["used", "idle"], lambda: block["used"](torch.zeros(1, 3)))


def test_non_finite_weights_are_named(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = write_tiny(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj"), gathered(folder, tmp_path / "s"):
        pass
