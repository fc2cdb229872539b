"""`mixt sweep` as a user types it, on a tiny model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mixt_export.checkpoints import open_checkpoint
from mixt_export.compression import compress
from mixt_export.errors import UsageError
from mixt_export.evaluation import perplexity
from mixt_export.sweep import SweepOptions, sweep
from mixt_export.sweep import run as run_module
from tests.sweep.setup import TEXT, write_material
from tests.verbs import run_verb

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_material(tmp_path_factory.mktemp("sweep"))


def options(folder: Path, **given: Any) -> SweepOptions:
    plain: dict[str, Any] = {
        "blocks": "0:3",
        "texts": (folder / "text.txt",),
        "questions": str(folder / "questions.jsonl"),
        "calib": (str(folder / "text.txt"),),
        "calib_windows": 1,
        "windows": 2,
        "window": 32,
        "threads": 1,
    }
    return SweepOptions(**{**plain, **given})


def mixt(folder: Path, out: Path, *arguments: object) -> int:
    given = ["--text", folder / "text.txt", "--questions", folder / "questions.jsonl", "--window", 32, "--windows", 2]
    given += ["--calib", folder / "text.txt", "--calib-windows", 1, "--threads", 1]
    return run_verb("sweep", folder / "model", "-o", out, *given, *arguments)


def content(out: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((out / "sweep.json").read_text())
    return data


@pytest.fixture(scope="module")
def swept(folder: Path) -> Path:
    """A finished sweep of MixT, with its plot."""
    sweep(folder / "model", folder / "swept", options(folder, n_tensors=(3,)))
    return folder / "swept"


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than everything else."""
    monkeypatch.setattr(run_module, "draw", lambda _data, _folder: ())


def test_rows_are_what_single_runs_give(folder: Path, swept: Path, tmp_path: Path) -> None:
    rows = {(str(row["variant"]), row["n_blocks"]): row for row in content(swept)["rows"]}
    assert len(rows) == 4
    compress(
        folder / "model",
        tmp_path / "one",
        method="mixt",
        blocks="last:2",
        n_tensors=3,
        refine_steps=0,
        controls=False,
        calib=(str(folder / "text.txt"),),
        settings=run_module.compress_arguments(options(folder), options(folder).variants()[0], 1)["settings"],
    )
    row = rows["{'n_tensors': 3}", 2]
    score = perplexity(
        tmp_path / "one", folder / "text.txt", window=32, windows=2, reference=folder / "model", threads=1
    )
    found = row["texts"]["text.txt"]
    assert found["tokens"] == score.tokens
    assert found["perplexity"] == pytest.approx(score.perplexity, rel=1e-4)
    assert found["kl"] == pytest.approx(score.kl, rel=1e-3)
    assert found["agreement"] == pytest.approx(score.agreement)
    assert row["domains"] == {"own": found}
    dense, one = (
        sum(t.ref.size for t in open_checkpoint(p).store.values()) for p in (folder / "model", tmp_path / "one")
    )
    assert row["params"] == one
    assert row["params_share"] == pytest.approx(one / dense)


def test_the_dense_row_and_the_direction_of_the_figures(swept: Path) -> None:
    rows = content(swept)["rows"]
    dense = rows[0]
    assert (dense["variant"], dense["n_blocks"], dense["params_share"], dense["drift"]) == (None, 0, 1.0, 0.0)
    assert dense["domains"]["own"]["kl"] == 0.0
    assert dense["questions"]["same_choice_as_dense"] == 1.0
    assert dense["drift_by_layer"] == [0.0] * 3
    curve = rows[1:]
    assert [(row["variant"], row["n_blocks"]) for row in curve] == [({"n_tensors": 3}, count) for count in (1, 2, 3)]
    assert (np.diff([row["params"] for row in curve]) < 0).all()
    assert all(row["domains"]["own"]["kl"] > 0 and row["drift"] > 0 for row in curve)
    assert [np.count_nonzero(row["drift_by_layer"]) for row in curve] == [1, 2, 3]
    assert {row["questions"]["questions"] for row in rows} == {9}
    assert all(sum(row["questions"]["predicted"]) == 9 for row in rows)


def test_files_and_settings(swept: Path) -> None:
    assert sorted(path.name for path in swept.iterdir()) == ["sweep.json", "sweep.png", "sweep.svg"]
    assert (swept / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (swept / "sweep.svg").read_text()
    data = content(swept)
    assert str(swept.parent) not in json.dumps(data)
    assert data["settings"]["questions"]["source"] == "questions.jsonl"
    assert [found["figure"] for found in data["transitions"][:4]] == [
        "own log perplexity",
        "own KL",
        "accuracy",
        "drift",
    ]
    assert "6 are needed" in data["transitions"][0]["statement"]


@pytest.mark.usefixtures("undrawn")
def test_a_finished_sweep_is_kept_and_grows(
    folder: Path, swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "sweep.json").write_bytes((swept / "sweep.json").read_bytes())
    before = content(out)["rows"]
    made: list[tuple[object, object]] = []
    original = run_module.compress

    def counted(*args: Any, **arguments: Any) -> Any:
        made.append((arguments["n_tensors"], arguments["blocks"]))
        return original(*args, **arguments)

    monkeypatch.setattr(run_module, "compress", counted)
    again = sweep(folder / "model", out, options(folder, n_tensors=(3,)))
    assert (made, again.measured, again.kept) == ([], 0, 4)
    assert content(out)["rows"] == before
    more = sweep(folder / "model", out, options(folder, n_tensors=(2, 3), blocks="1"))
    assert (made, more.measured, more.kept) == ([(2, "last:1")], 1, 4)
    assert [row for row in content(out)["rows"] if row["variant"] != {"n_tensors": 2}] == before
    with pytest.raises(UsageError, match="another window"):
        sweep(folder / "model", out, options(folder, n_tensors=(3,), window=16))


@pytest.mark.usefixtures("undrawn")
def test_an_interrupted_sweep_goes_on_and_ends_as_an_undisturbed_one(
    folder: Path, swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = run_module.compress, iter(range(100))

    def interrupted(*args: Any, **arguments: Any) -> Any:
        if next(calls) == 1:
            raise KeyboardInterrupt
        return original(*args, **arguments)

    monkeypatch.setattr(run_module, "compress", interrupted)
    out = tmp_path / "out"
    given = options(folder, n_tensors=(3,), blocks="0:2")
    with pytest.raises(KeyboardInterrupt):
        sweep(folder / "model", out, given)
    assert [path.name for path in out.iterdir()] == ["sweep.json"]
    assert [row["n_blocks"] for row in content(out)["rows"]] == [0, 1]
    result = sweep(folder / "model", out, given)
    assert (result.measured, result.kept) == (1, 2)

    def timeless(row: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in row.items() if key != "cpu_seconds"}

    assert list(map(timeless, content(out)["rows"])) == list(map(timeless, content(swept)["rows"][:3]))


@pytest.mark.usefixtures("undrawn")
def test_recovery_comes_between_making_and_measuring(folder: Path, swept: Path, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text(TEXT * 10)
    given = options(folder, n_tensors=(3,), blocks="1", recover_steps=2, calib=(str(tmp_path / "long.txt"),))
    sweep(folder / "model", tmp_path / "out", given)
    recovered, plain = content(tmp_path / "out")["rows"][1], content(swept)["rows"][1]
    assert list(recovered["cpu_seconds"]) == ["compress", "recover", "measure"]
    assert recovered["params"] == plain["params"]
    assert recovered["domains"]["own"]["nll"] != plain["domains"]["own"]["nll"]
    assert recovered["drift_by_layer"][:2] == [0.0, 0.0]


def test_an_interrupt_before_the_first_row_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_args: Any, **_named: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "load_reference", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweep(folder / "model", tmp_path / "out", options(folder))
    assert not (tmp_path / "out").exists()


def test_the_verb_with_another_method_and_without_matplotlib(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out = tmp_path / "out"
    assert mixt(folder, out, "--method", "svd", "--keep", 0.5, "--blocks", "0,3", "--score", "continuation") == 0
    shown = capsys.readouterr()
    assert [path.name for path in out.iterdir()] == ["sweep.json"]
    assert "pip install 'mixt-export[report]'" in shown.err
    said = " ".join(shown.out.split())
    for words in ("keep 0.5", "smoke data: 9 questions of questions.jsonl", "guessing gives 0.25", "2 rows measured"):
        assert words in said
    assert "MMLU" not in said


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--method", "magic"], 4, "'magic' is unknown"),
        (["--blocks", "4"], 2, "the model has 3 blocks"),
        (["--blocks", "last:2"], 2, "not understood"),
        (["--n-tensors", "9"], 2, "--n-tensors"),
        (["--keep", "0.5"], 2, "--keep does not apply to method mixt"),
        (["--method", "svd", "--keep", "3"], 2, "--keep 3"),
        (["--method", "tucker", "--refine-steps", "2"], 2, "--refine-steps"),
        (["--window", "400"], 2, "reads at most 256"),
        (["--window", "256", "--text", "short.txt"], 2, "less than one window of 256"),
        (["--text", "absent.txt"], 2, "absent.txt"),
        (["--questions", "bad.jsonl"], 2, "line 1: has no 'choices'"),
        (["--questions", "absent.jsonl"], 2, "absent.jsonl"),
        (["--limit", "0"], 2, "--limit 0"),
        (["--score", "guess"], 2, "letters, continuation"),
    ],
)
def test_mistakes_end_in_one_sentence_and_leave_nothing(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "bad.jsonl").write_text('{"question": "?", "answer": 1}\n')
    assert mixt(folder, tmp_path / "out", *arguments) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert words in error
    assert not (tmp_path / "out").exists()


def test_rows_that_somebody_edited_are_refused(folder: Path, tmp_path: Path, swept: Path) -> None:
    data = content(swept)
    del data["rows"][1]["domains"]
    out = tmp_path / "out"
    out.mkdir()
    (out / "sweep.json").write_text(json.dumps(data))
    with pytest.raises(UsageError, match="not a readable sweep"):
        sweep(folder / "model", out, options(folder, n_tensors=(2,)))
