"""Golden graphs of mixtures of experts: a change of lowering must show up in review as a change of text."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixt_export.targets import plan_export
from mixt_export.targets.trt import TrtOptions
from tests import golden
from tests.moe.folders import write_factorised
from tests.tiny import write_tiny

ONE_LAYER = {"num_hidden_layers": 1, "mlp_only_layers": [], "num_experts": 3, "num_experts_per_tok": 2}


def test_dense(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model", "qwen3_moe", **ONE_LAYER)
    golden.check("qwen3_moe-dense.ort", golden.as_text(plan_export(folder, target="ort").lowered.model))


def test_td_moe(tmp_path: Path) -> None:
    folder = write_factorised(tmp_path, **ONE_LAYER)
    golden.check("qwen3_moe-td-moe.onnx", golden.as_text(plan_export(folder, target="onnx").lowered.model))


@pytest.mark.parametrize(("jetpack", "dialect"), [(6, "trt10"), (7, "trt11")])
def test_td_moe_in_a_loop(tmp_path: Path, jetpack: int, dialect: str) -> None:
    folder = write_factorised(tmp_path, **ONE_LAYER)
    plan = plan_export(folder, target="trt", dtype="fp16", max_seq_len=64, trt=TrtOptions(jetpack=jetpack))
    golden.check(f"qwen3_moe-td-moe.{dialect}.fp16", golden.as_text(plan.lowered.model))
