"""Block refinement of the low rank methods, from folder to folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixt_export.checkpoints import open_checkpoint
from tests.compression.test_compress import Interrupting
from tests.compression.test_sequential import inputs, run


def block_error(model: Path, output: Path, text: Path) -> float:
    """Mean relative squared error, token by token, of the last block's output on the calibration windows."""
    states = [inputs(folder, model, text, ["model.norm"])["model.norm"] for folder in (model, output)]
    return float((((states[0] - states[1]) ** 2).sum(1) / (states[0] ** 2).sum(1)).mean())


@pytest.mark.parametrize("method", ["gfw-svd", "asvd", "aa-svd"])  # every metric; factors of X and of X'
def test_refinement_lowers_the_loss_of_every_block(tmp_path: Path, model: Path, text: Path, method: str) -> None:
    report = run(model, tmp_path / "out", text, method=method, keep=0.5, refine_steps=8)
    assert [block.index for block in report.blocks] == [0, 1, 2]
    assert all(block.loss_after < block.loss_before for block in report.blocks)
    assert report.recipe["refine_steps"] == 8


@pytest.mark.parametrize("objective", ["input-agnostic", "anchored"])  # the worst start and the best
def test_refinement_improves_the_whole_model(tmp_path: Path, model: Path, text: Path, objective: str) -> None:
    given: dict[str, Any] = {"method": "aa-svd", "objective": objective, "keep": 0.5}
    run(model, tmp_path / "plain", text, **given)
    run(model, tmp_path / "refined", text, **given, refine_steps=15)
    assert block_error(model, tmp_path / "refined", text) < 0.9 * block_error(model, tmp_path / "plain", text)


def tensors(folder: Path) -> dict[str, np.ndarray]:
    store = open_checkpoint(folder).store
    return {name: store.read(name) for name in store}


def test_factors_norms_and_biases_of_replaced_blocks_are_trained_and_nothing_else(
    tmp_path: Path, model: Path, text: Path
) -> None:
    given: dict[str, Any] = {"method": "svd-llm", "keep": 0.5, "blocks": "1", "exclude": ["down_proj"]}
    run(model, tmp_path / "plain", text, **given)
    run(model, tmp_path / "refined", text, **given, refine_steps=3)
    before, after = tensors(tmp_path / "plain"), tensors(tmp_path / "refined")
    assert set(before) == set(after)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    block = {name for name in before if name.startswith("model.layers.1.")}
    assert changed == block - {"model.layers.1.mlp.down_proj.weight"}


def test_equal_seeds_give_equal_bytes(tmp_path: Path, model: Path, text: Path) -> None:
    given: dict[str, Any] = {"method": "aa-svd", "keep": 0.5, "refine_steps": 3}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(model, tmp_path / name, text, **given, seed=seed)
    first, second, third = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert first == second
    assert first != third


@pytest.mark.parametrize("options", [{"method": "svd"}, {"method": "svd-llm", "update": "anchored"}])
def test_an_interrupted_refinement_leaves_nothing(
    tmp_path: Path, model: Path, text: Path, options: dict[str, Any]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "out", text, **options, refine_steps=2, progress=Interrupting("compressing blocks"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "text.txt"]
