"""Golden graphs: a change of lowering must show up in review as a change of text."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixt_export.checkpoints import open_checkpoint, write_checkpoint
from mixt_export.targets import plan_export
from tests import golden
from tests.tiny import write_tiny, write_tiny_low_rank

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
