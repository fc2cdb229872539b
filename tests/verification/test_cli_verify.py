from __future__ import annotations

import json
from pathlib import Path

import pytest

from mixt_export.cli.guard import guarded
from mixt_export.cli.main import load_verb
from tests.verification.handmade import write_handmade

QUICK = ["--positions", "20", "--greedy-tokens", "3", "--no-memory", "--threads", "1"]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["mixt", *arguments])
    return guarded(load_verb("verify"), "mixt verify")


def test_passing(model: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    folder = write_handmade(tmp_path / "good", model)
    assert run(monkeypatch, str(folder), "--reference", str(model), *QUICK) == 0
    lines = capsys.readouterr().out.rstrip().splitlines()
    assert lines[-1] == "PASSED"
    assert any(line.startswith("minimum tolerance that passes: rel-L2 ") for line in lines)
    assert {"report.json", "report.html"} <= {path.name for path in folder.iterdir()}


def test_failing_exits_3_and_names_the_layer(model: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    folder = write_handmade(tmp_path / "bad", model, faults={"swapped": 1})
    assert run(monkeypatch, str(folder), "--reference", str(model), *QUICK) == 3
    assert capsys.readouterr().out.rstrip().splitlines()[-1] == "FAILED (first diverging layer model.layers.1)"


def test_json_output(model: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    folder = write_handmade(tmp_path / "good", model)
    assert run(monkeypatch, str(folder), "--reference", str(model), "--json", *QUICK) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize("arguments", [["--tolerance", "0"], ["--positions", "1"], ["--prompts", "no-such-file"]])
def test_bad_usage_exits_2(arguments: list[str], model: Path, exported: Path, monkeypatch, capsys) -> None:
    assert run(monkeypatch, str(exported), "--reference", str(model), *arguments, "--no-memory") == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_missing_folder_exits_2(model: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    assert run(monkeypatch, str(tmp_path / "none"), "--reference", str(model)) == 2
    assert run(monkeypatch, str(tmp_path), "--reference", str(tmp_path / "none")) == 2
    assert "Traceback" not in capsys.readouterr().err
