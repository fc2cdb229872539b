"""Recovery end to end on tiny models."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from mixt_export.checkpoints import open_checkpoint
from mixt_export.compression.recover import RecoverReport, RecoverSettings, recover
from mixt_export.compression.recover.state import StateFolder
from mixt_export.errors import CheckpointError, UsageError
from mixt_export.evaluation import perplexity
from mixt_export.progress import Silent
from mixt_export.reference import load_reference
from tests.tiny import write_tiny, write_tiny_low_rank, write_tiny_mixt

SETTINGS = RecoverSettings(
    steps=9,
    batch=2,
    window=24,
    windows=10,
    held_out=2,
    sampled=0,
    eval_windows=2,
    common=64,
    others=48,
    likely=4,
    checks=3,
    matrix_rate=0.05,
)


def write_texts(folder: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    words = ["lorem", "ipsum", "dolor", "sit", "amet", "sed", "quia", "non"]
    found = []
    for name in ("one", "two"):
        path = folder / f"{name}.txt"
        path.write_text(" ".join(rng.choice(words, 150)), encoding="utf-8")
        found.append(path)
    return found


class Case:
    """A dense folder, a low-rank student of its last two blocks, and texts."""

    def __init__(self, folder: Path, model_type: str = "llama", first: int = 1, **options: Any) -> None:
        self.folder = folder
        self.texts = write_texts(folder)
        self.dense = write_tiny(folder / "dense", model_type, **options)
        self.student = write_tiny_low_rank(
            folder / "student", self.dense, 6, include=lambda name: int(name.split(".")[2]) >= first
        )

    def run(self, name: str = "out", **given: Any) -> RecoverReport:
        arguments = {"texts": self.texts, "settings": SETTINGS, **given}
        return recover(self.student, self.dense, self.folder / name, **arguments)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


def same_bytes(a: Path, b: Path) -> bool:
    return all(
        (a / name).read_bytes() == (b / name).read_bytes() for name in ("model.safetensors", "mixt_factors.json")
    )


def test_the_student_comes_closer_and_nothing_frozen_moves(case: Case) -> None:
    report = case.run(eval_texts=[case.texts[0]])
    assert [score.role for score in report.scores] == ["held out", "held out", "evaluation"]
    assert all(score.kl_after < 0.9 * score.kl_before for score in report.scores)
    assert report.blocks == (1, 2)
    assert report.linears == 14
    before = load_file(case.student / "model.safetensors")
    after = load_file(case.folder / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    expected = {
        name for name in before if ".core" in name or (name.endswith("norm.weight") and ".layers.0." not in name)
    }
    assert moved == expected
    written = json.loads((case.folder / "out" / "recover_report.json").read_text())
    assert written["scores"] == json.loads(json.dumps(report.to_dict()))["scores"]
    info = open_checkpoint(case.folder / "out").info
    assert info["method"] == "random low rank"
    assert info["recover"]["best_step"] == report.best_step
    assert not list(case.folder.glob(".*"))
    assert not (case.folder / "out.recover").exists()


@pytest.mark.parametrize("first", [0, 2])
def test_scores_are_those_of_the_models_on_disk(tmp_path: Path, first: int) -> None:
    """The first window of an evaluation text through load_reference, against what the cached front gave."""
    case = Case(tmp_path, "qwen2", first, tied=False)
    settings = RecoverSettings(**{**SETTINGS.__dict__, "eval_windows": 3})
    report = case.run(eval_texts=[case.texts[1]], settings=settings)
    (score,) = [score for score in report.scores if score.role == "evaluation"]
    for folder, found in (
        (case.dense, score.teacher),
        (case.student, score.before),
        (case.folder / "out", score.after),
    ):
        expected = perplexity(folder, case.texts[1], window=24, windows=3, threads=1).perplexity
        assert found == pytest.approx(expected, rel=2e-2)


def test_text_that_the_teacher_samples_helps_to_choose(case: Case) -> None:
    """The divergence that chooses is the mean of the training texts' ends and of what the teacher wrote."""
    report = case.run(settings=replace(SETTINGS, sampled=3))
    (sampled,) = [score for score in report.scores if score.role == "validation"]
    assert sampled.text == "self"
    assert sampled.tokens == 3 * 23
    ends = [score for score in report.scores if score.role == "held out"]
    for check, moment in ((report.checks[0], "kl_before"), (report.checks[-1], "kl_after")):
        inside = sum(getattr(end, moment) for end in ends) / len(ends)
        assert check.held_out_kl == pytest.approx((inside + getattr(sampled, moment)) / 2, rel=0.05)


def test_validation_texts_take_the_place_of_sampled_text(case: Case) -> None:
    report = case.run(validation=[case.texts[1]], settings=replace(SETTINGS, sampled=3))
    assert [score.role for score in report.scores] == ["held out", "held out", "validation"]
    assert report.scores[2].text == "two.txt"
    with pytest.raises(UsageError, match="no such text"):
        case.run("other", validation=[case.folder / "absent.txt"])


def test_windows_are_as_many_as_the_steps_visit(case: Case) -> None:
    report = case.run(settings=replace(SETTINGS, windows=None, steps=3))
    assert report.distinct_tokens == report.tokens == 3 * 2 * 24


def test_equal_arguments_give_equal_bytes_and_another_seed_does_not(case: Case) -> None:
    case.run("a")
    case.run("b")
    case.run("c", seed=1)
    assert same_bytes(case.folder / "a", case.folder / "b")
    assert not same_bytes(case.folder / "a", case.folder / "c")


def interrupt_at(check: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Interrupt the run right after its ``check``-th state was saved; returns what takes that back."""
    save, seen = StateFolder.save, []

    def saving(self: StateFolder, state: Any) -> None:
        save(self, state)
        seen.append(state.step)
        if len(seen) == check:
            raise KeyboardInterrupt

    monkeypatch.setattr(StateFolder, "save", saving)
    return monkeypatch.undo


@pytest.mark.parametrize("check", [1, 2, 3])
def test_an_interrupted_run_that_is_resumed_gives_the_same_bytes(
    case: Case, check: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case.run("straight")
    undo = interrupt_at(check, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        case.run("broken")
    undo()
    assert not (case.folder / "broken").exists()
    assert [path.name for path in (case.folder / "broken.recover").iterdir()] == ["state.safetensors"]
    case.run("broken", resume=True)
    assert same_bytes(case.folder / "straight", case.folder / "broken")
    assert not (case.folder / "broken.recover").exists()


def test_a_state_of_other_arguments_or_a_damaged_one_is_refused(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    undo = interrupt_at(1, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        case.run()
    undo()
    with pytest.raises(UsageError, match="another student, teacher, text or option"):
        case.run(resume=True, seed=3)
    state = case.folder / "out.recover" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(UsageError, match="is damaged"):
        case.run(resume=True)
    case.run()


def test_resume_without_a_state_starts_at_the_beginning(case: Case) -> None:
    said: list[str] = []

    class Listening(Silent):
        def note(self, message: str) -> None:
            said.append(message)

    case.run("a", resume=True, progress=Listening())
    assert said == [f"nothing to resume in {case.folder / 'a.recover'}: starting at the beginning."]
    case.run("b")
    assert same_bytes(case.folder / "a", case.folder / "b")


def test_half_precision_stays_half_precision_and_runs(tmp_path: Path) -> None:
    case = Case(tmp_path, dtype="bfloat16")
    report = case.run()
    assert all(score.kl_after < score.kl_before for score in report.scores)
    store = open_checkpoint(case.folder / "out").store
    assert {ref.dtype for ref in store.refs.values()} == {"bfloat16"}
    load_reference(case.folder / "out")


def test_scores_are_those_of_what_is_stored(tmp_path: Path) -> None:
    """A recovered half-precision model is measured after rounding, not as it was in float32."""
    case = Case(tmp_path, dtype="bfloat16")
    report = case.run(eval_texts=[case.texts[1]])
    again = recover(
        case.folder / "out",
        case.dense,
        case.folder / "again",
        texts=case.texts,
        eval_texts=[case.texts[1]],
        settings=SETTINGS,
    )
    for first, second in zip(report.scores, again.scores, strict=True):
        assert second.before == pytest.approx(first.after, rel=1e-6)
        assert second.kl_before == pytest.approx(first.kl_after, rel=1e-5)


def test_the_best_step_is_kept_when_training_goes_astray(case: Case) -> None:
    """With steps ten times as long as the factors the first check is worse, and patience ends the run."""
    settings = RecoverSettings(**{**SETTINGS.__dict__, "matrix_rate": 10.0, "learning_rate": 1.0, "patience": 1})
    report = case.run(settings=settings)
    assert report.best_step == 0
    assert [check.step for check in report.checks] == [0, 3]
    assert report.steps == 3
    before, after = (load_file(folder / "model.safetensors") for folder in (case.student, case.folder / "out"))
    assert all(np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("padded", [False, True])
def test_mixt_in_all_blocks(tmp_path: Path, padded: bool) -> None:
    case = Case(tmp_path)
    case.student = write_tiny_mixt(case.folder / "mixt", case.dense, 3, paper_padding=padded)
    report = case.run()
    assert report.blocks == (0, 1, 2)
    assert all(score.kl_after < 0.9 * score.kl_before for score in report.scores)


def rewrite_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_dense_model_itself_is_no_student(case: Case) -> None:
    with pytest.raises(UsageError, match="no linear is factorised"):
        recover(case.dense, case.dense, case.folder / "out", texts=case.texts)


def test_a_factorised_teacher_is_refused(case: Case) -> None:
    with pytest.raises(UsageError, match="the teacher is factorised itself"):
        recover(case.student, case.student, case.folder / "out", texts=case.texts)


def test_teachers_that_do_not_match(case: Case) -> None:
    stranger = write_tiny(case.folder / "stranger", seed=5)
    with pytest.raises(UsageError, match=r"was not made from .*the values of .* differ"):
        recover(case.student, stranger, case.folder / "out", texts=case.texts)
    rewrite_config(stranger, rope_theta=1e6)
    with pytest.raises(UsageError, match=r"config\.json has rope_theta"):
        recover(case.student, stranger, case.folder / "out", texts=case.texts)
    larger = write_tiny(case.folder / "larger", vocab_size=320)
    with pytest.raises(UsageError, match=r"config\.json has vocab_size 300 against 320"):
        recover(case.student, larger, case.folder / "out", texts=case.texts)
    (case.dense / "tokenizer.json").write_text((case.dense / "tokenizer.json").read_text() + "\n")
    with pytest.raises(UsageError, match=r"tokenizer\.json differs"):
        case.run()


def test_texts_that_are_too_short(case: Case) -> None:
    short = case.folder / "short.txt"
    short.write_text("x" * 71)
    with pytest.raises(UsageError, match="71 tokens are too few to train on; 72 are needed"):
        case.run(texts=[short])
    short.write_text("x" * 23)
    with pytest.raises(UsageError, match=r"23 tokens give no window of 24; .* smaller --window"):
        case.run(eval_texts=[short])
    with pytest.raises(UsageError, match="no such text"):
        case.run(texts=[case.folder / "absent.txt"])


def test_the_output_is_guarded(case: Case) -> None:
    with pytest.raises(UsageError, match="contains the input"):
        recover(case.student, case.dense, case.student, texts=case.texts, overwrite=True)
    case.run()
    with pytest.raises(UsageError, match="--overwrite"):
        case.run()
    case.run(overwrite=True)


def test_a_folder_without_a_tokenizer(case: Case) -> None:
    (case.student / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        case.run()


@pytest.mark.parametrize(
    "given", [{"steps": 0}, {"window": 1}, {"final": 1.5}, {"learning_rate": 0.0}, {"patience": 0}]
)
def test_settings_that_make_no_sense(given: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        RecoverSettings(**given)
