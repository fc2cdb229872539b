"""Multiple-choice questions as token sequences, and what a model's probabilities at them amount to."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixt_export.errors import UnsupportedError, UsageError
from mixt_export.evaluation.diagnostics import output_entropy, prediction_entropy
from mixt_export.sample.questions import LABELS, Question
from mixt_export.verification.session import Ids
from mixt_export.verification.tokens import encode

#: Accuracy of guessing.
CHANCE = 1 / len(LABELS)

#: Two-sided 95 % quantile of the normal distribution.
_Z = 1.959963984540054


@dataclass(frozen=True)
class Read:
    """The log-probability of ``token`` after position ``position`` counts towards ``choice``."""

    position: int
    token: int
    choice: int


@dataclass(frozen=True)
class ChoiceSequence:
    """One sequence to run, tokens (length,) int64, and what to read from it."""

    tokens: Ids
    reads: tuple[Read, ...]


@dataclass(frozen=True)
class EncodedQuestion:
    """A question as sequences that share their tokens up to ``position``, the answer position.

    The score of a choice is the mean of its log-probabilities; its probability is the softmax of the four scores.
    """

    sequences: tuple[ChoiceSequence, ...]
    position: int
    answer: int


def by_letters(tokenizer: Any, question: Question) -> EncodedQuestion:
    """The form of MMLU's own harness, without examples: question, lettered choices, ``Answer:``, then `` A`` to `` D``.

    One sequence; a choice is scored by its letter's token alone, so that the softmax of the scores is the model's
    probability of the four letters, renormalised. Raises UnsupportedError when a letter is not one token.
    """
    about = f" about {question.subject}" if question.subject else ""
    lettered = "".join(f"{label}. {choice}\n" for label, choice in zip(LABELS, question.choices, strict=True))
    prompt = (
        f"The following are multiple choice questions (with answers){about}.\n\n{question.question}\n{lettered}Answer:"
    )
    whole = [encode(tokenizer, f"{prompt} {label}") for label in LABELS]
    shared = _common(whole)
    letters = {int(ids[shared]) for ids in whole if len(ids) == shared + 1}
    if len(letters) != len(LABELS) or shared == 0:
        raise UnsupportedError(
            "this tokenizer does not make one token of each of the letters A to D after 'Answer:'; "
            "score by --score continuation."
        )
    reads = tuple(Read(shared - 1, int(ids[shared]), choice) for choice, ids in enumerate(whole))
    return EncodedQuestion((ChoiceSequence(whole[0][:shared], reads),), shared - 1, question.answer)


def by_continuation(tokenizer: Any, question: Question) -> EncodedQuestion:
    """``Question: …`` and ``Answer:``, then each choice in full; four sequences.

    The score of a choice is the mean log-probability of its own tokens (their sum over their number).
    """
    prompt = f"Question: {question.question}\nAnswer:"
    whole = [encode(tokenizer, f"{prompt} {choice}") for choice in question.choices]
    start = _common([encode(tokenizer, prompt), *whole])
    sequences = tuple(
        ChoiceSequence(ids[:-1], tuple(Read(place - 1, int(ids[place]), choice) for place in range(start, len(ids))))
        for choice, ids in enumerate(whole)
    )
    if start == 0 or not all(sequence.reads for sequence in sequences):
        raise UnsupportedError(f"this tokenizer leaves no tokens for a choice of {question.question[:60]!r}.")
    return EncodedQuestion(sequences, start - 1, question.answer)


#: How choices can be scored -> what does it.
SCORINGS: dict[str, Callable[[Any, Question], EncodedQuestion]] = {
    "letters": by_letters,
    "continuation": by_continuation,
}


def encode_questions(
    tokenizer: Any, questions: Sequence[Question], scoring: str = "letters", longest: int | None = None
) -> list[EncodedQuestion]:
    """``questions`` as tokens, no special ones, scored by one of SCORINGS.

    Raises UsageError for an unknown scoring and for a question of more than ``longest`` tokens, UnsupportedError when
    the tokenizer does not allow the scoring.
    """
    if scoring not in SCORINGS:
        raise UsageError(f"--score {scoring!r} is unknown; choose one of {', '.join(SCORINGS)}.")
    encoded = [SCORINGS[scoring](tokenizer, question) for question in questions]
    for question, item in zip(questions, encoded, strict=True):
        most = max(len(sequence.tokens) for sequence in item.sequences)
        if longest is not None and most > longest:
            raise UsageError(
                f"the question {question.question[:60]!r} has {most} tokens, more than the {longest} that the model "
                "can read; leave it out."
            )
    return encoded


def _common(sequences: Sequence[Ids]) -> int:
    """Length of the longest prefix that all ``sequences`` share."""
    shortest = min(map(len, sequences))
    table = np.stack([sequence[:shortest] for sequence in sequences])
    differs = (table != table[0]).any(axis=0)
    return int(differs.argmax()) if differs.any() else shortest


def choice_scores(
    question: EncodedQuestion, log_probabilities: Callable[[ChoiceSequence], Sequence[float]]
) -> NDArray[np.float64]:
    """Score (4,) of each choice; ``log_probabilities(sequence)`` gives one value per entry of ``sequence.reads``."""
    total, count = np.zeros(len(LABELS)), np.zeros(len(LABELS))
    for sequence in question.sequences:
        for read, value in zip(sequence.reads, log_probabilities(sequence), strict=True):
            total[read.choice] += value
            count[read.choice] += 1
    scores: NDArray[np.float64] = total / count
    return scores


def probabilities(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Softmax over the last axis of ``scores`` (questions, 4)."""
    exponentials = np.exp(scores - scores.max(axis=-1, keepdims=True))
    p: NDArray[np.float64] = exponentials / exponentials.sum(axis=-1, keepdims=True)
    return p


def wilson_interval(correct: int, questions: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of ``correct`` among ``questions`` independent trials."""
    share, spread = correct / questions, _Z**2 / questions
    centre = (share + spread / 2) / (1 + spread)
    half = _Z * math.sqrt(share * (1 - share) / questions + spread / (4 * questions)) / (1 + spread)
    return max(centre - half, 0.0), min(centre + half, 1.0)


def chance_of_guessing(correct: int, questions: int) -> float:
    """Probability that guessing among four gets ``correct`` or more of ``questions`` right: the exact binomial tail."""
    tail = sum(math.comb(questions, hits) * 3 ** (questions - hits) for hits in range(correct, questions + 1))
    return float(tail / 4**questions)


@dataclass(frozen=True)
class ChoiceSummary:
    """Figures of a set of questions. ``interval``: see wilson_interval; ``p_guessing``: see chance_of_guessing.

    ``predicted``: how often each of A to D had the highest probability (the first of equals). ``output_entropy`` and
    ``prediction_entropy``: see diagnostics.
    """

    questions: int
    correct: int
    accuracy: float
    interval: tuple[float, float]
    chance: float
    p_guessing: float
    predicted: tuple[int, ...]
    output_entropy: float
    prediction_entropy: float


def summarise(p: NDArray[np.float64], answers: Sequence[int]) -> ChoiceSummary:
    """Figures of the probabilities ``p`` (questions, 4) against the right ``answers``."""
    labels = p.argmax(axis=-1)
    correct = int((labels == np.asarray(answers)).sum())
    return ChoiceSummary(
        questions=len(p),
        correct=correct,
        accuracy=correct / len(p),
        interval=wilson_interval(correct, len(p)),
        chance=CHANCE,
        p_guessing=chance_of_guessing(correct, len(p)),
        predicted=tuple(np.bincount(labels, minlength=len(LABELS)).tolist()),
        output_entropy=output_entropy(p),
        prediction_entropy=prediction_entropy(labels, len(LABELS)),
    )
