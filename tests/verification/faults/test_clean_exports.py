"""No alarm at exports that are right: a sample of those of benchmarks/faults.py."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mixt_export.progress import SILENT
from mixt_export.verification import verify
from mixt_export.verification.checks import files
from mixt_export.verification.context import Context
from tests.verification.faults.cases import small_case
from tests.verification.faults.conftest import QUICK
from tests.verification.faults.exported import Exported

CASES = (
    "llama ort", "low-rank ort fp16", "mixt onnx fp16", "gemma2 ort fp16", "gpt2 onnx fp16", "qwen2 onnx",
    "qwen3_moe ort", "llama trt",
)  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_clean_export_passes(case: str, root: Path) -> None:
    model, clean = small_case(case, root)
    report = verify(clean, model, options=QUICK)
    assert report.passed, [(check.name, check.reason) for check in report.checks if not check.passed]
    assert {"files", "declared", "tables", "far"} <= {check.name for check in report.checks}


def test_an_edited_copy_without_a_fault_passes(root: Path, tmp_path: Path) -> None:
    """The injector itself breaks nothing: a constant moved into the weight file, digests and counts refreshed."""
    model, clean = small_case("low-rank ort", root)
    x = Exported(clean, tmp_path / "copy")
    name = x.weights(1, "up_proj")[0]
    x.put(name, x.value(name))
    report = verify(x.save(), model, options=QUICK)
    assert report.passed, [(check.name, check.reason) for check in report.checks if not check.passed]


def test_a_graph_in_the_model_folder_is_no_fault(root: Path, tmp_path: Path) -> None:
    """Published folders may hold a model.onnx of their own beside the weights."""
    model, clean = small_case("llama ort", root)
    copy = shutil.copytree(model, tmp_path / "model")
    (copy / "model.onnx").write_bytes(b"another graph")
    assert files.run(Context(clean, copy, QUICK, SILENT)).passed
