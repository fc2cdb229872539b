"""Export with its last step: a clean one passes; a broken lowering is caught, kept with its report, exit code 3."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from mixt_export.cli.main import mixt_export
from mixt_export.errors import UsageError
from mixt_export.lower.attention import interface
from mixt_export.targets import export
from mixt_export.verification import verify
from mixt_export.verification.options import SHORTEST
from tests.tiny import write_tiny, write_tiny_low_rank


@pytest.fixture
def model(tmp_path: Path) -> Path:
    base = write_tiny(tmp_path / "base", num_hidden_layers=2)
    return write_tiny_low_rank(tmp_path / "model", base)


@pytest.mark.parametrize("target", ["ort", "onnx"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_clean_export_passes(tmp_path: Path, model: Path, target: str, dtype: str) -> None:
    result = export(model, tmp_path / "out", target=target, dtype=dtype)
    assert result.ok and result.report.passed
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["passed"] and len(report["checks"]) >= 7
    assert (tmp_path / "out" / "report.html").is_file()


def test_too_short_to_verify_is_said_before_anything_is_written(tmp_path: Path, model: Path) -> None:
    assert export(model, tmp_path / "short", max_seq_len=SHORTEST).ok
    with pytest.raises(UsageError, match=f"--max-seq-len {SHORTEST - 1}: verifying takes at least {SHORTEST}"):
        export(model, tmp_path / "out", max_seq_len=SHORTEST - 1)
    assert not (tmp_path / "out").exists()
    export(model, tmp_path / "out", max_seq_len=1, verify=False)
    with pytest.raises(UsageError, match="has 1 positions, verifying takes at least"):
        verify(tmp_path / "out", model)


def test_cut_layers_are_judged_against_a_cut_reference(tmp_path: Path, model: Path) -> None:
    assert export(model, tmp_path / "out", num_layers=1).ok


def test_a_broken_lowering_exits_with_3(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = interface.cos_sin_tables

    def swapped(*arguments: object) -> object:
        cos, sin = right(*arguments)  # type: ignore[arg-type]
        return cos, -sin

    monkeypatch.setattr(interface, "cos_sin_tables", swapped)
    monkeypatch.setattr(sys, "argv", ["mixt-export", str(model), "-o", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as exit_of:
        mixt_export()
    said = capsys.readouterr()
    assert exit_of.value.code == 3
    assert "FAILED (first diverging layer embeddings: rotary table)" in said.out
    assert said.err.startswith("error: ") and "does not compute what PyTorch computes" in said.err
    assert (tmp_path / "out" / "model.onnx").is_file()
    assert json.loads((tmp_path / "out" / "report.json").read_text())["passed"] is False
