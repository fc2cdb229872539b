"""`mixt recover`: what it prints and its exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixt_export.cli.guard import guarded
from mixt_export.cli.main import load_verb
from tests.tiny import write_tiny, write_tiny_mixt


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["mixt recover", *map(str, arguments)])
    return guarded(load_verb("recover"), "mixt recover")


def test_it_writes_a_folder_and_shows_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = write_tiny(tmp_path / "dense")
    student = write_tiny_mixt(tmp_path / "student", dense, include=lambda name: ".layers.2." in name)
    (tmp_path / "text.txt").write_text("a text to train on, " * 20)
    options = [
        "--text",
        tmp_path / "text.txt",
        "--steps",
        2,
        "--window",
        16,
        "--windows",
        4,
        "--report",
        tmp_path / "r.json",
    ]
    assert call(monkeypatch, student, "--teacher", dense, "-o", tmp_path / "out", *options) == 0
    shown = capsys.readouterr()
    assert "7 linears in 1 block," in shown.out
    assert "text.txt" in shown.out
    assert (tmp_path / "r.json").read_text() == (tmp_path / "out" / "recover_report.json").read_text()
    assert call(monkeypatch, student, "--teacher", dense, "-o", tmp_path / "out", *options) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_bad_input_is_one_sentence_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = write_tiny(tmp_path / "dense")
    assert call(monkeypatch, dense, "--teacher", dense, "-o", tmp_path / "out") == 2
    assert call(monkeypatch, tmp_path / "none", "--teacher", dense, "-o", tmp_path / "out") == 2
    assert call(monkeypatch, dense, "--teacher", dense, "-o", tmp_path / "out", "--steps", "0") == 2
    assert call(monkeypatch, dense, "--teacher", dense, "-o", tmp_path / "out", "--report", tmp_path / "no" / "r") == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(said) == 4
    assert all(line.startswith("error: ") for line in said)
    assert not (tmp_path / "out").exists()
