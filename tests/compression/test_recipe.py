"""Compress and recover as one run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mixt_export.checkpoints import open_checkpoint
from mixt_export.cli.guard import guarded
from mixt_export.cli.main import load_verb
from mixt_export.compression import Settings, compress
from mixt_export.compression.recover import compress_and_recover, recipe, recover
from mixt_export.compression.recover.state import StateFolder
from mixt_export.errors import UsageError
from tests.compression.test_recover import SETTINGS, same_bytes, write_texts
from tests.tiny import write_tiny

#: A student that compress made is close to its teacher: small steps.
CAREFUL = replace(SETTINGS, matrix_rate=0.003)


class Case:
    """A dense folder, texts, and options that make a run take a second."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.dense = write_tiny(folder / "dense")
        self.options: dict[str, Any] = {
            "keep": 0.5,
            "calib": write_texts(folder),
            "settings": Settings(windows=4, window=24, fisher_windows=2),
            "cache": False,
            "evaluate": False,
        }

    def run(self, name: str, **given: Any) -> Any:
        arguments = {"options": self.options, "settings": CAREFUL, **given}
        return compress_and_recover(self.dense, self.folder / name, **arguments)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


def test_it_is_compress_then_recover(case: Case) -> None:
    made, report = case.run("out")
    assert made.keep_achieved == pytest.approx(0.5, abs=0.005)
    assert all(score.kl_after < score.kl_before for score in report.scores)
    compress(case.dense, case.folder / "student", **case.options)
    recover(case.folder / "student", case.dense, case.folder / "by hand", texts=case.options["calib"], settings=CAREFUL)
    assert same_bytes(case.folder / "out", case.folder / "by hand")
    for name in ("compress_report.json", "recover_report.json"):
        assert json.loads((case.folder / "out" / name).read_text())
    assert open_checkpoint(case.folder / "out").info["method"] == "gfw-svd"
    assert not (case.folder / "out.recover").exists()
    assert not list(case.folder.glob(".*"))


def test_evaluation_texts_are_measured(case: Case) -> None:
    options = {**case.options, "evaluate": True, "eval_text": [case.options["calib"][0]]}
    _, report = case.run("out", options=options)
    assert [score.role for score in report.scores] == ["held out", "held out", "evaluation"]


def test_an_interrupted_recipe_goes_on_without_compressing_again(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    case.run("straight")
    save = StateFolder.save

    def saving(self: StateFolder, state: Any) -> None:
        save(self, state)
        raise KeyboardInterrupt

    monkeypatch.setattr(StateFolder, "save", saving)
    with pytest.raises(KeyboardInterrupt):
        case.run("broken")
    monkeypatch.undo()
    assert not (case.folder / "broken").exists()
    with pytest.raises(UsageError, match="another model or option"):
        case.run("broken", options={**case.options, "keep": 0.6}, resume=True)
    monkeypatch.setattr(recipe, "compress", lambda *_args, **_given: pytest.fail("compressed again"))
    made, _ = case.run("broken", resume=True)
    assert made is None
    assert same_bytes(case.folder / "straight", case.folder / "broken")
    assert not (case.folder / "broken.recover").exists()


def test_nothing_is_removed_for_arguments_that_make_no_sense(case: Case) -> None:
    kept = case.folder / "out.recover" / recipe.STUDENT / "kept"
    kept.parent.mkdir(parents=True)
    kept.write_text("of an earlier run")
    with pytest.raises(UsageError):
        case.run("out", options={**case.options, "keep": 1.5})
    with pytest.raises(UsageError, match="contains the input"):
        compress_and_recover(case.dense, case.dense, options={**case.options, "overwrite": True})
    assert kept.exists()


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["mixt compress", *map(str, arguments)])
    return guarded(load_verb("compress"), "mixt compress")


def test_the_command(case: Case, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--windows", 4, "--window", 24, "--fisher-windows", 2, "--no-cache", "--no-eval", "--keep", 0.5]
    long = case.folder / "long.txt"
    long.write_text("a longer text, since windows of a recovery have 256 tokens; " * 60)
    command = [case.dense, "-o", case.folder / "out", "--calib", long, *small]
    assert call(monkeypatch, *command, "--recover", "--recover-steps", 1, "--report", case.folder / "r.json") == 0
    shown = capsys.readouterr()
    assert "parameters in the targeted" in shown.out
    assert "linears in 3 blocks" in shown.out
    assert set(json.loads((case.folder / "r.json").read_text())) == {"compress", "recover"}
    assert call(monkeypatch, *command, "--overwrite", "--resume") == 2
    assert "go with --recover" in capsys.readouterr().err
