"""Which blocks of a compressed model are still those of the dense one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mixt_export.checkpoints import open_checkpoint
from mixt_export.sweep.front import unchanged_blocks
from tests.tiny import write_tiny, write_tiny_low_rank

LAYERS = 3


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("front") / "model", tied=False)


def unchanged(dense: Path, other: Path) -> int:
    return unchanged_blocks(open_checkpoint(dense), open_checkpoint(other), "model.layers", LAYERS)


@pytest.mark.parametrize("first", [0, 1, 2])
def test_factorised_blocks(dense: Path, tmp_path: Path, first: int) -> None:
    def late(name: str) -> bool:
        return int(name.split(".")[2]) >= first

    assert unchanged(dense, write_tiny_low_rank(tmp_path / "out", dense, 8, include=late)) == first


def test_the_same_model(dense: Path) -> None:
    assert unchanged(dense, dense) == LAYERS


def bump(tensors: dict[str, np.ndarray], name: str) -> None:
    tensors[name].flat[-1] += np.float32(1e-6)


CHANGES: dict[str, tuple[Callable[[dict[str, np.ndarray]], object], int]] = {
    "norm inside block 1": (lambda t: bump(t, "model.layers.1.post_attention_layernorm.weight"), 1),
    "weight of block 2": (lambda t: bump(t, "model.layers.2.mlp.up_proj.weight"), 2),
    "embedding": (lambda t: bump(t, "model.embed_tokens.weight"), 0),
    "final norm": (lambda t: bump(t, "model.norm.weight"), LAYERS),
    "head": (lambda t: bump(t, "lm_head.weight"), LAYERS),
    "another dtype": (
        lambda t: t.update({"model.layers.2.mlp.up_proj.weight": t["model.layers.2.mlp.up_proj.weight"].astype("f2")}),
        2,
    ),
    "a tensor more": (lambda t: t.update({"model.rotary.weight": np.ones(3, np.float32)}), 0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_tensors(dense: Path, tmp_path: Path, change: str) -> None:
    edit, wanted = CHANGES[change]
    other = tmp_path / "other"
    shutil.copytree(dense, other)
    tensors = load_file(other / "model.safetensors")
    edit(tensors)
    save_file(tensors, other / "model.safetensors")
    assert unchanged(dense, other) == wanted


def test_order_of_blocks_is_that_of_numbers(tmp_path: Path) -> None:
    """Block 10 comes after block 9, not after block 1."""
    one = write_tiny(tmp_path / "one", num_hidden_layers=11)
    two = tmp_path / "two"
    shutil.copytree(one, two)
    tensors = load_file(two / "model.safetensors")
    bump(tensors, "model.layers.10.mlp.up_proj.weight")
    bump(tensors, "model.layers.9.mlp.up_proj.weight")
    save_file(tensors, two / "model.safetensors")
    assert json.loads((two / "config.json").read_text())["num_hidden_layers"] == 11
    assert unchanged_blocks(open_checkpoint(one), open_checkpoint(two), "model.layers", 11) == 9
