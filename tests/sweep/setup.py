"""What the tests of the sweep run on: a tiny model, a text, questions."""

from __future__ import annotations

import json
from pathlib import Path

from tests.tiny import write_tiny

TEXT = "It was the best of times, it was the worst of times; naïve façades — 17 of them.\n" * 4


def write_material(folder: Path, **config: object) -> Path:
    """model/, text.txt and questions.jsonl (9 questions of 3 subjects) in ``folder``; returns it."""
    write_tiny(folder / "model", **config)
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    questions = [
        {
            "subject": f"subject {number % 3}",
            "question": f"Which is {number}?",
            "choices": [str(number), "a word", "αβγ", "none of them"],
            "answer": "ABCD"[number % 4],
        }
        for number in range(9)
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in questions), encoding="utf-8")
    return folder
