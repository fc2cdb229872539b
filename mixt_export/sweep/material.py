"""What every model of a sweep is run on: windows of texts and encoded questions."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mixt_export.checkpoints import Checkpoint
from mixt_export.errors import CheckpointError, UsageError
from mixt_export.evaluation.multiple_choice import EncodedQuestion, encode_questions
from mixt_export.evaluation.perplexity import cut_windows
from mixt_export.progress import Progress
from mixt_export.sample.questions import digest, mmlu_dev, read_questions, spread
from mixt_export.sample.texts import EVALUATION, IN_DOMAIN
from mixt_export.sweep.options import MMLU_DEV, SweepOptions
from mixt_export.verification.session import Ids
from mixt_export.verification.tokens import encode, open_tokenizer, read_text

#: Domains of texts: of the shipped ones inside and outside those of the shipped calibration texts, and the user's own.
IN, OUT, OWN = "in-domain", "out-of-domain", "own"


@dataclass(frozen=True)
class Text:
    """One text: ``windows`` (count, window) int64 in order, ``sha256`` of the file."""

    name: str
    domain: str
    sha256: str
    windows: Ids


@dataclass(frozen=True)
class Material:
    """Texts, questions, and what sweep.json says of them."""

    texts: tuple[Text, ...]
    questions: tuple[EncodedQuestion, ...]
    description: dict[str, Any]

    @property
    def sequences(self) -> list[Ids]:
        """Every token sequence to run: the windows of all texts, then those of all questions."""
        windows = [window for text in self.texts for window in text.windows]
        return windows + [sequence.tokens for question in self.questions for sequence in question.sequences]

    @property
    def text_tokens(self) -> int:
        """Tokens of all windows; they come first in ``sequences``."""
        return sum(text.windows.size for text in self.texts)


def prepare(checkpoint: Checkpoint, options: SweepOptions, progress: Progress) -> Material:
    """Read, tokenise and check texts and questions.

    Raises UsageError for a text or question set that cannot be used, CheckpointError when the tokenizer does not fit
    the model, MissingDependencyError when the questions cannot be downloaded.
    """
    tokenizer = open_tokenizer(checkpoint.path)
    if tokenizer is None:
        raise CheckpointError(f"{checkpoint.path / 'tokenizer.json'}: missing; a sweep needs the model's tokenizer.")
    longest = int(checkpoint.config.get("max_position_embeddings", 0)) or None
    if longest is not None and options.window > longest:
        raise UsageError(f"--window {options.window}: the model reads at most {longest} tokens.")
    texts = tuple(_text(tokenizer, name, path, domain, options) for name, path, domain in _files(options.texts))
    source = options.questions
    known = mmlu_dev(progress=progress) if source == MMLU_DEV else read_questions(Path(source))
    asked = spread(known, options.limit)
    questions = tuple(encode_questions(tokenizer, asked, options.scoring, longest))
    material = Material(
        texts,
        questions,
        {
            "texts": [
                {"name": text.name, "domain": text.domain, "sha256": text.sha256, "windows": len(text.windows)}
                for text in texts
            ],
            "window": options.window,
            "questions": {
                "source": Path(source).name,
                "sha256": digest(asked),
                "count": len(asked),
                "scoring": options.scoring,
            },
        },
    )
    top = max(int(sequence.max()) for sequence in material.sequences)
    if top >= int(checkpoint.config.get("vocab_size", top + 1)):
        raise CheckpointError(
            f"{checkpoint.path}: tokenizer.json gives token {top}, but the model has "
            f"{checkpoint.config['vocab_size']}; the tokenizer belongs to another model."
        )
    return material


def _files(texts: Sequence[Path]) -> list[tuple[str, Path, str]]:
    """(name, path, domain) of every text; names are made distinct."""
    if not texts:
        return [(name, path, IN if name in IN_DOMAIN else OUT) for name, path in EVALUATION.items()]
    names = [path.name for path in texts]
    return [
        (name if names.count(name) == 1 else f"{number + 1}:{name}", path, OWN)
        for number, (name, path) in enumerate(zip(names, texts, strict=True))
    ]


def _text(tokenizer: Any, name: str, path: Path, domain: str, options: SweepOptions) -> Text:
    tokens = encode(tokenizer, read_text(path))
    if len(tokens) < options.window:
        raise UsageError(
            f"{path}: has {len(tokens)} tokens, which is less than one window of {options.window}; give a longer text "
            "or a smaller --window."
        )
    windows = np.stack(list(cut_windows(tokens, options.window, options.windows)))
    return Text(name, domain, hashlib.sha256(path.read_bytes()).hexdigest(), windows)
