"""Questions as tokens, scores from them, and their figures, against counting by hand."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from mixt_export.errors import UnsupportedError, UsageError
from mixt_export.evaluation.multiple_choice import (
    by_continuation,
    by_letters,
    chance_of_guessing,
    choice_scores,
    encode_questions,
    probabilities,
    summarise,
    wilson_interval,
)
from mixt_export.sample.questions import Question
from tests.tiny import write_tokenizer

QUESTION = Question("high school naïveté", "Which\nletter?", ("alpha", "alp", "gamma ray", "δ"), 2)


@pytest.fixture(scope="module")
def bytewise(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """One token a byte: a space before a letter is a token of its own."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def wordwise() -> Tokenizer:
    """One token a word with the space before it; unknown words are one token too."""
    words = ["[UNK]", *(f"Ġ{word}" for word in ("A", "B", "C", "D", "alpha")), "Answer:"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return tokenizer


PROMPT = (
    "The following are multiple choice questions (with answers) about high school naïveté.\n\n"
    "Which\nletter?\nA. alpha\nB. alp\nC. gamma ray\nD. δ\nAnswer:"
)


def test_letters(bytewise: Tokenizer, wordwise: Tokenizer) -> None:
    found = by_letters(bytewise, QUESTION)
    (sequence,) = found.sequences
    assert bytewise.decode(sequence.tokens.tolist()) == PROMPT + " "
    assert [bytewise.decode([read.token]) for read in sequence.reads] == list("ABCD")
    assert [read.choice for read in sequence.reads] == [0, 1, 2, 3]
    assert {read.position for read in sequence.reads} == {found.position} == {len(sequence.tokens) - 1}
    assert found.answer == 2
    (merged,) = by_letters(wordwise, QUESTION).sequences
    assert [read.token for read in merged.reads] == [1, 2, 3, 4]
    assert merged.tokens.tolist() == wordwise.encode(PROMPT).ids


def test_a_question_without_subject(bytewise: Tokenizer) -> None:
    (sequence,) = by_letters(bytewise, Question("", "Q", ("a", "b", "c", "d"), 0)).sequences
    text = bytewise.decode(sequence.tokens.tolist())
    assert text.startswith("The following are multiple choice questions (with answers).\n\nQ\nA. a\n")


def test_letters_that_are_no_single_tokens_are_refused() -> None:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(UnsupportedError, match="--score continuation"):
        by_letters(tokenizer, QUESTION)


def test_continuations(bytewise: Tokenizer) -> None:
    found = by_continuation(bytewise, QUESTION)
    prompt = "Question: Which\nletter?\nAnswer:"
    assert found.position == len(prompt.encode()) - 1
    for choice, sequence in enumerate(found.sequences):
        whole = bytewise.encode(f"{prompt} {QUESTION.choices[choice]}").ids
        assert sequence.tokens.tolist() == whole[:-1]
        assert [read.token for read in sequence.reads] == whole[len(prompt.encode()) :]
        assert [read.position for read in sequence.reads] == list(range(found.position, len(whole) - 1))
        assert {read.choice for read in sequence.reads} == {choice}


def test_scores_are_means_and_probabilities_their_softmax(bytewise: Tokenizer) -> None:
    rng = np.random.default_rng(3)
    found = by_continuation(bytewise, QUESTION)
    values = [rng.standard_normal(len(sequence.reads)) for sequence in found.sequences]
    given = iter(values)
    scores = choice_scores(found, lambda _sequence: next(given))
    wanted = [sum(some) / len(some) for some in values]
    np.testing.assert_allclose(scores, wanted)
    total = sum(math.exp(value) for value in wanted)
    np.testing.assert_allclose(probabilities(scores[None])[0], [math.exp(value) / total for value in wanted])
    np.testing.assert_allclose(probabilities(scores[None] - 5000.0), probabilities(scores[None]))


def test_unusable_questions(bytewise: Tokenizer) -> None:
    with pytest.raises(UsageError, match="letters, continuation"):
        encode_questions(bytewise, [QUESTION], "guess")
    with pytest.raises(UsageError, match="more than the 20 that the model can read"):
        encode_questions(bytewise, [QUESTION], "letters", 20)
    assert len(encode_questions(bytewise, [QUESTION] * 3, "letters", 500)) == 3


def test_figures() -> None:
    rng = np.random.default_rng(4)
    p = rng.dirichlet(np.ones(4), size=40)
    answers = rng.integers(0, 4, 40).tolist()
    found = summarise(p, answers)
    labels = [max(range(4), key=row.__getitem__) for row in p.tolist()]
    hits = sum(label == answer for label, answer in zip(labels, answers, strict=True))
    assert (found.questions, found.correct, found.accuracy) == (40, hits, hits / 40)
    assert found.predicted == tuple(labels.count(label) for label in range(4))
    assert found.chance == 0.25
    assert found.output_entropy == pytest.approx(np.mean([-(row * np.log(row)).sum() for row in p]) / math.log(4))


@pytest.mark.parametrize(("correct", "total"), [(0, 9), (9, 9), (16, 64), (30, 64), (1, 1)])
def test_wilson_interval_solves_its_equation(correct: int, total: int) -> None:
    low, high = wilson_interval(correct, total)
    assert 0.0 <= low <= correct / total <= high <= 1.0
    for end in (low, high):
        if 0.0 < end < 1.0:
            assert abs(correct / total - end) == pytest.approx(1.96 * math.sqrt(end * (1 - end) / total), rel=1e-3)


def test_guessing_by_enumeration() -> None:
    outcomes = [sum(hit == 0 for hit in guess) for guess in itertools.product(range(4), repeat=5)]
    for correct in range(6):
        assert chance_of_guessing(correct, 5) == pytest.approx(sum(hits >= correct for hits in outcomes) / 4**5)
    assert 0.0 < chance_of_guessing(150, 281) < 1e-12


def test_the_shipped_folder_layout_is_enough(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert encode_questions(tokenizer, [QUESTION])[0].position > 0
