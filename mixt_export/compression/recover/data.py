"""Tokens of a recovery: windows to train on, held-out ones from the end of the same texts, and evaluation texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mixt_export.compression.recover.settings import RecoverSettings
from mixt_export.compression.report import TextReport
from mixt_export.compression.texts import even_shares, open_tokenizer, read_text
from mixt_export.errors import CheckpointError, UsageError

Tokens = np.ndarray[Any, Any]
"""int64 (windows, length)."""

#: Roles of windows that are not trained on: the ends of the training texts and what is of another domain choose the
#: best step; evaluation texts choose nothing.
HELD_OUT, VALIDATION, EVALUATION = "held out", "validation", "evaluation"


@dataclass(frozen=True)
class Held:
    """Windows that are not trained on. ``role``: see report.Score; ``rows``: which of all windows they are."""

    text: str
    role: str
    rows: slice


@dataclass(frozen=True)
class Windows:
    """``tokens``: all windows, those to train on first; ``training``: how many these are; ``held``: the others."""

    tokens: Tokens
    training: int
    held: tuple[Held, ...]
    reports: tuple[TextReport, ...]


def cut(
    folder: Path,
    texts: Sequence[Path],
    validation: Sequence[Path],
    evaluation: Sequence[Path],
    sampled: tuple[Tokens, TextReport] | None,
    settings: RecoverSettings,
    length: int,
    limit: int,
) -> Windows:
    """Cut all texts into windows of ``length`` tokens without special tokens, training windows interleaved.

    Of each training text the last ``held_out`` windows are set aside, and training windows spread evenly over what is
    before them; of each validation text the first ``held_out``, of each evaluation text the first ``eval_windows`` are
    used. ``sampled``: validation windows that are tokens already. Tokens must be below ``limit``.
    Raises UsageError when a text is too short, CheckpointError when tokens do not fit the model.
    """
    streams = [_stream(folder, path, limit) for path in texts]
    held_tokens = settings.held_out * length
    for path, (stream, _) in zip(texts, streams, strict=True):
        if len(stream) < held_tokens + length:
            raise UsageError(
                f"{path}: {len(stream)} tokens are too few to train on; {held_tokens + length} are needed "
                f"({settings.held_out} windows of {length} held out, one to train on): give a longer text, or take a "
                "smaller --window."
            )
    rooms = [(len(stream) - held_tokens) // length for stream, _ in streams]
    shares = even_shares(rooms, settings.windows or settings.steps * settings.batch)
    spread = [
        _spread(stream[: len(stream) - held_tokens], share, length)
        for (stream, _), share in zip(streams, shares, strict=True)
    ]
    windows = [part[turn] for turn in range(max(shares)) for part in spread if turn < len(part)]
    training, held, reports = len(windows), [], []
    for path, (stream, digest), share in zip(texts, streams, shares, strict=True):
        held.append(Held(path.name, HELD_OUT, slice(len(windows), len(windows) + settings.held_out)))
        windows += list(stream[len(stream) - held_tokens :].reshape(-1, length))
        reports.append(TextReport(str(path), digest, len(stream), share))
    if sampled is not None:
        tokens, report = sampled
        held.append(Held(report.source, VALIDATION, slice(len(windows), len(windows) + len(tokens))))
        windows += list(tokens)
        reports.append(report)
    measured = [(path, VALIDATION, settings.held_out) for path in validation]
    measured += [(path, EVALUATION, settings.eval_windows) for path in evaluation]
    for path, role, most in measured:
        stream, digest = _stream(folder, path, limit)
        count = min(most, len(stream) // length)
        if count == 0:
            raise UsageError(
                f"{path}: {len(stream)} tokens give no window of {length}; give a longer text, or take a "
                "smaller --window."
            )
        held.append(Held(path.name, role, slice(len(windows), len(windows) + count)))
        windows += list(stream[: count * length].reshape(-1, length))
        reports.append(TextReport(str(path), digest, len(stream), count))
    return Windows(np.stack(windows), training, tuple(held), tuple(reports))


def _stream(folder: Path, path: Path, limit: int) -> tuple[Tokens, str]:
    text, digest = read_text(path)
    ids = np.asarray(open_tokenizer(folder).encode(text, add_special_tokens=False).ids, dtype=np.int64)
    if len(ids) and int(ids.max()) >= limit:
        raise CheckpointError(
            f"{folder}: tokenizer.json gives token {int(ids.max())}, but the model has {limit}; the tokenizer belongs "
            "to another model."
        )
    return ids, digest


def _spread(stream: Tokens, share: int, length: int) -> list[Tokens]:
    """``share`` windows without overlap, evenly over ``stream``."""
    room = len(stream) - share * length
    return [stream[start : start + length] for start in (i * length + i * room // max(1, share) for i in range(share))]
