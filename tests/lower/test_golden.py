"""Golden graphs: a change of lowering must show up in review as a change of text."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixt_export.checkpoints import open_checkpoint, write_checkpoint
from mixt_export.targets import plan_export
from tests import golden
from tests.tiny import write_tiny, write_tiny_low_rank, write_tiny_mixt

DENSE = ["llama", "mistral", "qwen2", "qwen3"]
TARGETS = ["ort", "onnx"]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", DENSE)
def test_dense(tmp_path: Path, family: str, target: str) -> None:
    folder = write_tiny(tmp_path / "model", family, num_hidden_layers=1, tied=family != "qwen2")
    golden.check(f"{family}-dense.{target}", golden.as_text(plan_export(folder, target=target).lowered.model))


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("target", TARGETS)
def test_low_rank(tmp_path: Path, target: str, dtype: str) -> None:
    base = write_tiny(tmp_path / "base", "qwen2", num_hidden_layers=1)
    folder = write_tiny_low_rank(tmp_path / "model", base, include=lambda name: not name.endswith("v_proj"))
    plan = plan_export(folder, target=target, dtype=dtype)
    golden.check(f"qwen2-low-rank.{target}.{dtype}", golden.as_text(plan.lowered.model))


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("target", TARGETS)
def test_mixt(tmp_path: Path, target: str, dtype: str) -> None:
    """Every kind of form in one block, with and without biases."""
    base = write_tiny(tmp_path / "base", "qwen2", num_hidden_layers=1)
    folder = write_tiny_mixt(
        tmp_path / "model", base, {"q_proj": 4, "k_proj": 4, "v_proj": 2, "up_proj": 3, "o_proj": 3}
    )
    forms = [("q_proj", "pairs"), ("k_proj", "merged:3"), ("v_proj", "dense"), ("up_proj", "branches")]
    forms.append(("o_proj", "branches-left"))
    plan = plan_export(folder, target=target, dtype=dtype, forms=forms)
    golden.check(f"qwen2-mixt.{target}.{dtype}", golden.as_text(plan.lowered.model))


def test_mixt_padded(tmp_path: Path) -> None:
    base = write_tiny(tmp_path / "base", "llama", num_hidden_layers=1)
    folder = write_tiny_mixt(tmp_path / "model", base, {"down_proj": 4}, bond=3, paper_padding=True)
    plan = plan_export(folder, target="onnx", forms=[("down", "pairs")])
    golden.check("llama-mixt-padded.onnx", golden.as_text(plan.lowered.model))


def test_adjacent_projections_are_packed_in_place(tmp_path: Path) -> None:
    base = write_tiny(tmp_path / "base", num_hidden_layers=1)
    source = open_checkpoint(base)
    (tmp_path / "model").mkdir()
    write_checkpoint(tmp_path / "model", source, [], {}, {})  # writes q, k, v side by side
    plan = plan_export(tmp_path / "model")
    names = {node.name for node in plan.lowered.model.graph}
    assert "/model/layers.0/self_attn/qkv_proj/MatMul" in names
    assert "/model/layers.0/self_attn/q_proj/MatMul" not in names
    golden.check("llama-dense-packed.ort", golden.as_text(plan.lowered.model))
