"""Golden graphs of the TensorRT dialects, and that ONNX's own checker accepts them at their opset."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from mixt_export.targets import export, plan_export
from mixt_export.targets.trt import TrtOptions
from tests import golden
from tests.building.models import write_structure
from tests.tiny import write_tiny, write_tiny_low_rank, write_tiny_mixt

DIALECTS = {"trt10": 6, "trt11": 7}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_dense(tmp_path: Path, family: str, dialect: str) -> None:
    folder = write_tiny(tmp_path / "model", family, num_hidden_layers=1)
    plan = plan_export(folder, target="trt", dtype="fp16", trt=TrtOptions(jetpack=DIALECTS[dialect]))
    golden.check(f"{family}-dense.{dialect}.fp16", golden.as_text(plan.lowered.model))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_low_rank_with_islands(tmp_path: Path, dialect: str) -> None:
    base = write_tiny(tmp_path / "base", "qwen2", num_hidden_layers=1)
    folder = write_tiny_low_rank(tmp_path / "model", base, include=lambda name: not name.endswith("v_proj"))
    islands = ("attention.0", "model.layers.0.self_attn.q_proj=3", "model.layers.0.mlp.down_proj", "lm_head=2")
    plan = plan_export(folder, target="trt", dtype="fp16", trt=TrtOptions(jetpack=DIALECTS[dialect], islands=islands))
    golden.check(f"qwen2-low-rank.{dialect}.fp16-islands", golden.as_text(plan.lowered.model))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_mixt(tmp_path: Path, dialect: str) -> None:
    """A form of every kind, with and without biases, an island among them."""
    base = write_tiny(tmp_path / "base", "qwen2", num_hidden_layers=1)
    sizes = {"q_proj": 4, "k_proj": 4, "v_proj": 2, "up_proj": 3, "o_proj": 3}
    folder = write_tiny_mixt(tmp_path / "model", base, sizes)
    forms = [("q_proj", "pairs"), ("k_proj", "merged:3"), ("v_proj", "dense"), ("up_proj", "branches")]
    forms.append(("o_proj", "branches-left"))
    trt = TrtOptions(jetpack=DIALECTS[dialect], islands=("model.layers.0.self_attn.k_proj=2",))
    plan = plan_export(folder, target="trt", dtype="fp16", forms=forms, trt=trt)
    golden.check(f"qwen2-mixt.{dialect}.fp16", golden.as_text(plan.lowered.model))


def test_tensor_train(tmp_path: Path) -> None:
    """Bodies that permute axes fold batch and positions into one first; those that do not stay as they are."""
    folder = write_structure(tmp_path, "tensor_train")
    plan = plan_export(folder, target="trt", dtype="fp16", forms=[("proj", "chain")], trt=TrtOptions(jetpack=6))
    golden.check("llama-tensor-train.trt10.fp16", golden.as_text(plan.lowered.model))


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])  # at fp32 weights are hardlinked, which the checker refuses
def test_the_checker_accepts_the_file(tmp_path: Path, dialect: str, dtype: str) -> None:
    folder = write_tiny(tmp_path / "model", "qwen3", num_hidden_layers=1)
    trt = TrtOptions(jetpack=DIALECTS[dialect])
    export(folder, tmp_path / "out", target="trt", dtype=dtype, verify=False, trt=trt)
    path = tmp_path / "out" / "model.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(path, load_external_data=False)
    assert {entry.domain: entry.version for entry in model.opset_import}[""] == (20 if dialect == "trt10" else 23)
    assert model.ir_version == (9 if dialect == "trt10" else 10)
