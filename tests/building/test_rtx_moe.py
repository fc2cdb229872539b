"""A plan for a mixture of experts really built by TensorRT-RTX, on the CPU. Nothing here runs on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixt_export.building import build_engine
from mixt_export.targets import export
from mixt_export.targets.trt import TrtOptions
from tests.moe.folders import write_factorised


@pytest.mark.parametrize(("jetpack", "profiles"), [(6, "one"), (7, "two")])
def test_routing_and_the_loop_over_blocks_are_parsed_and_compiled(tmp_path: Path, jetpack: int, profiles: str) -> None:
    model = write_factorised(tmp_path, num_hidden_layers=1, mlp_only_layers=[])
    options = TrtOptions(jetpack=jetpack, max_input_len=16)
    export(model, tmp_path / "out", target="trt", dtype="fp16", max_seq_len=64, trt=options, verify=False)
    golden = tmp_path / "out" / "device" / "golden"
    golden.mkdir(exist_ok=True)
    (golden / "golden.json").write_text("{}")
    report = build_engine(tmp_path / "out", backend="rtx", sm=86, profiles=profiles)
    assert report.claim == "parsed and compiled by TensorRT-RTX (SM86 proxy)"
    assert report.layers > 50
