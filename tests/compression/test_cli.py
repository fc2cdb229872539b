"""`mixt compress` as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mixt_export.cli.guard import guarded
from mixt_export.cli.main import load_verb
from mixt_export.compression import METHODS
from tests.tiny import write_tiny

SMALL = ["--windows", "4", "--window", "24", "--fisher-windows", "2"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 40, encoding="utf-8")
    return write_tiny(tmp_path / "model")


def mixt(*arguments: object) -> int:
    command = load_verb("compress")
    original = sys.argv
    sys.argv = ["mixt compress", *map(str, arguments)]
    try:
        return guarded(command, "mixt compress")
    finally:
        sys.argv = original


def test_a_run_prints_a_short_table_and_writes_the_report(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.json"
    text = tmp_path / "text.txt"
    code = mixt(model, "-o", tmp_path / "out", "--keep", 0.7, "--calib", text, "--report", report, *SMALL)
    assert code == 0
    shown = capsys.readouterr().out
    assert all(kind in shown for kind in ("q_proj", "down_proj", "peak memory", "kept 0.", "perplexity on novel"))
    assert len(shown.splitlines()) < 30
    assert json.loads(report.read_text()) == json.loads((tmp_path / "out" / "compress_report.json").read_text())


def test_a_dry_run_writes_nothing(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(tmp_path.iterdir())
    assert mixt(model, "-o", tmp_path / "out", "--dry-run", "--keep", 0.5, "--include", r"layers\.0") == 0
    shown = capsys.readouterr().out
    assert "7 linears" in shown
    assert "calib_" in shown
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--keep", "2"], 2, "--keep 2"),
        (["--method", "magic"], 4, "gfw-svd, svd-llm, svd-llm-v2, aa-svd, asvd, svd"),
        (["--include", "nothing_like_it"], 2, "matches none"),
        (["--calib", "missing.txt"], 2, "missing.txt"),
        (["--windows", "0"], 2, "windows is 0"),
        (["--cache", "x", "--no-cache"], 2, "--no-cache"),
        (["--eval-text", "x", "--no-eval"], 2, "--no-eval"),
        (["--eval-windows", "0"], 2, "--eval-windows 0"),
        (["--store", "int3"], 2, "remap8"),
        (["--ranks", "clever"], 2, "svd-llm-v2"),
        (["--report", "no/such/folder/r.json"], 2, "folder does not exist"),
    ],
)
def test_mistakes_end_in_one_sentence_and_the_documented_code(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, words: str
) -> None:
    assert mixt(model, "-o", tmp_path / "out", *arguments) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert words in error
    assert not (tmp_path / "out").exists()


def test_help_needs_no_torch_and_names_every_method() -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = sys.modules['numpy'] = None\n"
        "from mixt_export.cli.main import load_verb\n"
        "load_verb('compress').main(['--help'], standalone_mode=False)"
    )
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert all(method in shown for method in METHODS)
