"""Questions from few-shot prompts, from the pinned wheel, from the user's file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zipfile
from pathlib import Path

import pytest

from mixt_export.errors import MissingDependencyError, UsageError
from mixt_export.sample import fetch, questions
from mixt_export.sample.questions import Question, digest, mmlu_dev, parse_prompts, read_questions, spread

PROMPTS = {
    "high_school_cooking": (
        "The following are multiple choice questions (with answers) about high school cooking.\n\n"
        "Q: What boils?\n(A) Ice (B) Water (C) Salt (D) Sand\nA: Let's think. Water does. The answer is (B).\n\n"
        "Q: Two lines\n first\n(A) one\n more (B) two (C) (x) (y) (D) $4$.\nA: Thus the answer is (D).\n\n"
    ),
    "odd": (
        "The following are multiple choice questions.\n\n"
        "Q: Five?\n(A) 1 (B) 2 (C) 3 (D) 4 (E) 5\nA: The answer is (A).\n\n"
        "Q: Last of five?\n(A) 1 (B) 2 (C) 3 (D) 4 (E) 5\nA: The answer is (E).\n\n"
        "Q: No answer?\n(A) 1 (B) 2 (C) 3 (D) 4\nA: I do not know.\n\n"
        "Q: Good?\n(A) yes (B) no (C) so (D) la\nA: The answer is (A).\n\n"
    ),
}


def test_examples_become_questions_and_what_has_not_four_choices_is_left_out() -> None:
    assert parse_prompts(PROMPTS) == [
        Question("high school cooking", "What boils?", ("Ice", "Water", "Salt", "Sand"), 1),
        Question("high school cooking", "Two lines\n first", ("one\n more", "two", "(x) (y)", "$4$."), 3),
        Question("odd", "Good?", ("yes", "no", "so", "la"), 0),
    ]


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel with the prompts above in the place of the pinned one."""
    path = tmp_path / "made.whl"
    content = json.dumps(PROMPTS).encode()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("folder/prompts.json", content)
    pinned = dataclasses.replace(questions._WHEEL, file=path.name, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(questions, "_WHEEL", pinned)
    monkeypatch.setattr(questions, "_MEMBER", "folder/prompts.json")
    monkeypatch.setattr(questions, "_MEMBER_BYTES", len(content))
    monkeypatch.setattr(questions, "_MEMBER_SHA256", hashlib.sha256(content).hexdigest())
    return path


def test_the_wheel_is_fetched_once_and_kept(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def download(pinned: fetch.PinnedWheel, folder: Path) -> None:
        asked.append(pinned.requirement)
        (folder / pinned.file).write_bytes(wheel.read_bytes())

    monkeypatch.setattr(fetch, "pip_download", download)
    cache = tmp_path / "cache"
    assert mmlu_dev(cache=cache) == mmlu_dev(cache=cache) == parse_prompts(PROMPTS)
    assert asked == ["lm-eval==0.4.13"]
    assert sorted(path.name for path in cache.iterdir()) == [".lock", wheel.name]


def test_a_wrong_wheel_is_refused_and_no_network_names_the_way_out(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "pip_download", lambda pinned, folder: (folder / pinned.file).write_bytes(b"other"))
    with pytest.raises(UsageError, match=r"is not the wheel of lm-eval==0\.4\.13"):
        mmlu_dev(cache=tmp_path / "cache")
    monkeypatch.undo()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(MissingDependencyError, match=r"the MMLU dev questions cannot be downloaded .*--questions FILE"):
        mmlu_dev(cache=tmp_path / "empty")


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


GOOD = {"question": " Why? ", "choices": ["a", "b", " c", "d"], "answer": "C"}


def test_a_file_of_questions(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", GOOD, "", {**GOOD, "subject": "logic", "answer": 0, "more": 1})
    assert read_questions(path) == [
        Question("", "Why?", ("a", "b", "c", "d"), 2),
        Question("logic", "Why?", ("a", "b", "c", "d"), 0),
    ]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2: is not JSON"),
        ("[" * 100_000, "line 2: is not JSON"),
        ("[1]", "line 2: is not a JSON object"),
        ({"question": "?", "answer": 1}, "line 2: has no 'choices'"),
        ({**GOOD, "question": "  "}, "'question' must be a text"),
        ({**GOOD, "subject": 3}, "'question' must be a text"),
        ({**GOOD, "choices": ["a", "b", "c"]}, "four different texts"),
        ({**GOOD, "choices": ["a", "b", "c", "a "]}, "four different texts"),
        ({**GOOD, "choices": ["a", "b", "c", ""]}, "four different texts"),
        ({**GOOD, "choices": ["a", "b", "c", 4]}, "four different texts"),
        ({**GOOD, "choices": "abcd"}, "four different texts"),
        ({**GOOD, "answer": 4}, "'answer' is 4"),
        ({**GOOD, "answer": True}, "'answer' is True"),
        ({**GOOD, "answer": "E"}, "'answer' is 'E'"),
        ('{"question": "\\ud800", "choices": ["a", "b", "c", "d"], "answer": 0}', "line 2: is not JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: object, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_questions(write(tmp_path / "q.jsonl", GOOD, line))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_hold_no_questions(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no questions"):
        read_questions(write(tmp_path / "empty.jsonl", "", " "))
    with pytest.raises(UsageError, match="No such file"):
        read_questions(tmp_path / "absent.jsonl")
    (tmp_path / "latin.jsonl").write_bytes("façade".encode("latin-1"))
    with pytest.raises(UsageError, match="not UTF-8"):
        read_questions(tmp_path / "latin.jsonl")


def test_a_limit_covers_all_subjects() -> None:
    many = [Question(subject, str(number), ("a", "b", "c", "d"), 0) for subject in "xyz" for number in range(4)]
    assert [(one.subject, one.question) for one in spread(many, 5)] == [
        ("x", "0"),
        ("y", "0"),
        ("z", "0"),
        ("x", "1"),
        ("y", "1"),
    ]
    assert sorted(map(str, spread(many, None))) == sorted(map(str, many))
    assert spread([], 3) == []


def test_the_digest_follows_the_questions() -> None:
    one = Question("s", "q", ("a", "b", "c", "d"), 0)
    assert digest([one]) == digest([dataclasses.replace(one)])
    assert digest([one]) != digest([dataclasses.replace(one, answer=1)])
