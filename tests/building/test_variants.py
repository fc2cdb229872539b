"""TensorRT-RTX compiles, on the CPU, a graph with two forms of some linears and a sparse residual."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from mixt_export.building import build_engine
from mixt_export.targets import export
from mixt_export.targets.trt import TrtOptions
from tests.targets.test_variants import always, model

__all__ = ["always", "model"]  # fixtures


@pytest.mark.usefixtures("always")
def test_branches_and_residual_are_parsed_and_compiled(tmp_path: Path, model: Path) -> None:
    options = TrtOptions(jetpack=6, max_input_len=16)
    export(
        model, tmp_path / "out", target="trt", dtype="fp16", max_seq_len=64, trt=options, variants="one", verify=False
    )
    proto = onnx.load_model(str(tmp_path / "out" / "model.onnx"), load_external_data=False)
    assert sum(node.op_type == "If" for node in proto.graph.node) == 2
    assert any(function.name.startswith("SparseResidual") for function in proto.functions)
    (tmp_path / "out" / "device" / "golden").mkdir()
    (tmp_path / "out" / "device" / "golden" / "golden.json").write_text("{}")
    report = build_engine(tmp_path / "out", backend="rtx", sm=86)
    assert report.nbytes > 0 and report.layers > 50
