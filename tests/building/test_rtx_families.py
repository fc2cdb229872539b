"""Families beyond Llama's kin, compiled by TensorRT-RTX on the CPU. Nothing here runs on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixt_export.building import build_engine
from mixt_export.targets import export
from mixt_export.targets.trt import TrtOptions
from tests.tiny import write_tiny

#: Family, JetPack and dtype: every operator that Llama's kin does not use.
CASES = [
    ("gpt2", 6, "fp16"),
    ("gptj", 7, "fp16"),
    ("gemma2", 7, "fp16"),
    ("gemma3_text", 6, "bf16"),
]


@pytest.mark.parametrize(("family", "jetpack", "dtype"), CASES)
def test_parsed_and_compiled(tmp_path: Path, family: str, jetpack: int, dtype: str) -> None:
    model = write_tiny(tmp_path / "model", family, **({"n_layer": 2} if family.startswith("gpt") else {}))
    options = TrtOptions(jetpack=jetpack, max_input_len=16)
    export(model, tmp_path / "out", target="trt", dtype=dtype, max_seq_len=64, trt=options, verify=False)
    (tmp_path / "out" / "device" / "golden").mkdir()
    (tmp_path / "out" / "device" / "golden" / "golden.json").write_text("{}")
    report = build_engine(tmp_path / "out", backend="rtx", sm=86 if jetpack == 6 else 120, profiles="one")
    assert report.claim.startswith("parsed and compiled by TensorRT-RTX") and report.layers > 50
