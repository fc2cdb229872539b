"""`mixt compress --method mixt` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mixt_export.sample.texts import EVALUATION
from tests.compression.test_cli import mixt
from tests.tiny import write_tiny


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    rng = np.random.default_rng(0)
    for name in ("text", "addresses", "novel"):
        (tmp_path / f"{name}.txt").write_text("".join(rng.choice(list("abc def."), 1500)), encoding="utf-8")
    for domain in ("addresses", "novel"):
        monkeypatch.setitem(EVALUATION, domain, tmp_path / f"{domain}.txt")
    return write_tiny(tmp_path / "model")


def test_a_run_prints_the_layers_the_controls_and_the_warnings(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--method", "mixt", "--n-tensors", 4, "--n-tensors", "q_proj=2", "--blocks", "last:1"]
    small = ["--windows", 4, "--window", 24, "--refine-steps", 2, "--calib", tmp_path / "text.txt"]
    assert mixt(model, "-o", tmp_path / "out", *arguments, *small) == 0
    shown = capsys.readouterr()
    assert all(word in shown.out for word in ("N_T 2", "N_T 4", "low rank", "deleted", "novel", "addresses"))
    assert len(shown.out.splitlines()) < 40
    report = json.loads((tmp_path / "out" / "compress_report.json").read_text())
    assert shown.err.replace("\n", " ").count("warning: ") == len(report["controls"]["warnings"])
    assert "keep the order of their hidden channels" in shown.err.replace("\n", " ")  # 8² does not divide 104
    assert report["recipe"]["n_tensors"] == ["4", "q_proj=2"]
    assert {layer["name"].rsplit(".", 1)[1]: layer["terms"] for layer in report["layers"]}["q_proj"] == 2


def test_a_dry_run_says_the_recipe(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert mixt(model, "-o", tmp_path / "out", "--method", "mixt", "--blocks", "0-1", "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "blocks 0-1, n_tensors 4, bond 2, paper_padding False" in shown
    assert "14 linears" in shown
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "mixt", "--keep", "0.9"], "--keep does not apply to method mixt"),
        (["--method", "mixt", "--fisher-windows", "2"], "does not apply to method mixt"),
        (["--method", "svd", "--n-tensors", "4"], "--n-tensors does not apply to method svd"),
        (["--no-controls"], "--controls does not apply to method gfw-svd"),
        (["--paper-padding"], "--paper-padding does not apply to method gfw-svd"),
        (["--method", "mixt", "--blocks", "last:2", "--n-tensors", "6"], "2^5 = 32, as --n-tensors 6"),
        (["--method", "mixt", "--blocks", "last:2", "--n-tensors", "1"], "give 2 or more"),
        (["--method", "mixt", "--blocks", "last:2", "--n-tensors", "many"], "--n-tensors many"),
        (["--method", "mixt", "--blocks", "last:2", "--bond", "7"], "7^3 = 343"),
        (["--method", "mixt", "--blocks", "last:4"], "has 3 blocks"),
        (["--blocks", "some"], "'some' is not understood"),
        (["--blocks", "3"], "no block 3"),
    ],
)
def test_mistakes_end_in_one_sentence_and_code_2(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert mixt(model, "-o", tmp_path / "out", *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert words in error
    assert not (tmp_path / "out").exists()
