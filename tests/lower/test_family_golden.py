"""Golden graphs of the families beyond Llama's kin: one block, every target, one dense and one factorised variant."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixt_export.targets import plan_export
from mixt_export.targets.trt import TrtOptions
from tests import golden
from tests.tiny import write_tiny, write_tiny_low_rank

ONE_BLOCK = {
    "gpt2": {"n_layer": 1},
    "gptj": {"n_layer": 1},
    "gemma2": {"num_hidden_layers": 1},
    "gemma3_text": {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
}


@pytest.mark.parametrize("target", ["ort", "onnx"])
@pytest.mark.parametrize("family", ONE_BLOCK)
def test_dense(tmp_path: Path, family: str, target: str) -> None:
    folder = write_tiny(tmp_path / "model", family, **ONE_BLOCK[family])
    golden.check(f"{family}-dense.{target}", golden.as_text(plan_export(folder, target=target).lowered.model))


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_low_rank(tmp_path: Path, family: str) -> None:
    base = write_tiny(tmp_path / "base", family, **ONE_BLOCK[family])
    folder = write_tiny_low_rank(tmp_path / "model", base)
    golden.check(f"{family}-low-rank.ort", golden.as_text(plan_export(folder).lowered.model))


@pytest.mark.parametrize("jetpack", [6, 7])
@pytest.mark.parametrize("family", ["gptj", "gemma2"])
def test_trt(tmp_path: Path, family: str, jetpack: int) -> None:
    folder = write_tiny(tmp_path / "model", family, **ONE_BLOCK[family])
    plan = plan_export(folder, target="trt", dtype="fp16", trt=TrtOptions(jetpack=jetpack))
    name = {6: "trt10", 7: "trt11"}[jetpack]
    golden.check(f"{family}-dense.{name}.fp16", golden.as_text(plan.lowered.model))
