"""Perplexity over non-overlapping windows; KL and top-1 agreement with another model on the same windows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mixt_export.errors import UsageError
from mixt_export.evaluation.scorers import Scorer, open_scorer
from mixt_export.progress import SILENT, Progress
from mixt_export.verification.metrics import kl_divergence, log_softmax
from mixt_export.verification.session import Ids
from mixt_export.verification.tokens import encode, open_tokenizer, read_text

_ROWS = 64


@dataclass(frozen=True)
class TextScore:
    """Figures of one text. ``nll``: mean negative log likelihood in nats of ``tokens`` predicted tokens.

    With another model: ``kl`` is mean KL(other ‖ this) in nats, ``agreement`` the share of positions with the same
    top token, ``other_perplexity`` the other's perplexity on the same windows.
    """

    tokens: int
    windows: int
    nll: float
    kl: float | None = None
    agreement: float | None = None
    other_perplexity: float | None = None

    @property
    def perplexity(self) -> float:
        """exp(nll)."""
        return math.exp(self.nll) if self.nll < 700 else math.inf


def perplexity(
    model: Path | Scorer,
    text: str | Path,
    *,
    window: int = 512,
    windows: int | None = None,
    reference: Path | Scorer | None = None,
    threads: int = 0,
    progress: Progress = SILENT,
) -> TextScore:
    """Perplexity of ``model`` on ``text`` (a string, or a path to a UTF-8 file).

    The text is tokenised whole without special tokens and cut into non-overlapping windows of ``window`` tokens, of
    which the first ``windows`` count (None: all); a last short window is dropped unless it is the only one. In each
    window every token but the first is predicted from those before it. ``reference`` is another model with the same
    tokenizer to compare with. Logits of one window at a time are held.
    Raises UsageError when the text is too short, is not UTF-8, or the two models differ in vocabulary.
    """
    if window < 2 or (windows is not None and windows < 1):
        raise UsageError(f"--window {window} --windows {windows}: a window needs 2 tokens, and there must be one.")
    ours = open_scorer(model, threads) if isinstance(model, Path) else model
    theirs = open_scorer(reference, threads) if isinstance(reference, Path) else reference
    tokens = tokenise(ours.folder, read_text(text) if isinstance(text, Path) else text)
    cuts = list(cut_windows(tokens, window, windows))
    totals = _Totals()
    with progress.task("scoring", len(cuts)) as advance:
        for cut in cuts:
            totals.add(cut, ours, theirs)
            advance(1)
    return totals.score(len(cuts))


def tokenise(folder: Path, text: str) -> Ids:
    """Tokens of ``text`` by the folder's tokenizer.json, without special tokens.

    Raises UsageError when there is none.
    """
    tokenizer = open_tokenizer(folder)
    if tokenizer is None:
        raise UsageError(f"{folder}: has no tokenizer.json, so a text cannot be scored; copy it from the model.")
    return encode(tokenizer, text)


def cut_windows(tokens: Ids, window: int, windows: int | None) -> Iterator[Ids]:
    """Non-overlapping windows; see perplexity."""
    if len(tokens) < 2:
        raise UsageError(f"the text has {len(tokens)} tokens; perplexity needs at least 2.")
    whole = max(len(tokens) // window, 1)
    for index in range(min(whole, windows or whole)):
        yield tokens[index * window : (index + 1) * window]


class _Totals:
    def __init__(self) -> None:
        self.tokens = 0
        self.nll = self.other_nll = self.kl = 0.0
        self.agreed = 0
        self.compared = False

    def add(self, tokens: Ids, ours: Scorer, theirs: Scorer | None) -> None:
        logits = ours.logits(tokens)[:-1]
        others = None if theirs is None else theirs.logits(tokens)[:-1]
        if others is not None and theirs is not None and others.shape != logits.shape:
            raise UsageError(
                f"{theirs.folder} has {others.shape[-1]} tokens in its vocabulary, {ours.folder} {logits.shape[-1]}; "
                "compare models with the same tokenizer."
            )
        targets = tokens[1:]
        self.tokens += len(targets)
        for start in range(0, len(targets), _ROWS):  # float64 copies stay small
            part = slice(start, start + _ROWS)
            rows = np.arange(len(targets[part]))
            self.nll -= float(log_softmax(logits[part])[rows, targets[part]].sum())
            if others is not None:
                self.compared = True
                self.other_nll -= float(log_softmax(others[part])[rows, targets[part]].sum())
                self.kl += float(kl_divergence(others[part], logits[part]).sum())
                self.agreed += int((others[part].argmax(-1) == logits[part].argmax(-1)).sum())

    def score(self, windows: int) -> TextScore:
        nll = self.nll / self.tokens
        if not self.compared:
            return TextScore(self.tokens, windows, nll)
        other = TextScore(self.tokens, windows, self.other_nll / self.tokens)
        return TextScore(
            self.tokens,
            windows,
            nll,
            kl=max(self.kl, 0.0) / self.tokens,
            agreement=self.agreed / self.tokens,
            other_perplexity=other.perplexity,
        )
