"""The token sequences that verification runs: real prompts and texts where the folder has a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mixt_export.checkpoints import companion
from mixt_export.errors import UsageError
from mixt_export.resources import texts
from mixt_export.tokenizer import load_tokenizer
from mixt_export.verification.options import VerifyOptions
from mixt_export.verification.session import Ids

#: Short starts of English, code, numbers, dialogue and other scripts: many kinds of tokens.
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village between two rivers,",
    "def fibonacci(n):\n    ",
    "Question: What is 17 + 25?\nAnswer:",
    "The three laws of thermodynamics state that",
    "Dear Sir or Madam,\n\nI am writing to",
    "Wasser besteht aus Wasserstoff und",
    "1, 1, 2, 3, 5, 8, 13,",
)
_MAX_TEXT_BYTES = 64 << 20


@dataclass(frozen=True)
class Sequences:
    """``windows``: texts cut for teacher forcing. ``prompts``: starts to continue. ``origin``: what both are."""

    windows: list[Ids]
    prompts: list[Ids]
    origin: str


def read_text(path: Path) -> str:
    """The text of a UTF-8 file.

    Raises UsageError when it is missing, too large, not UTF-8 or blank.
    """
    try:
        size = path.stat().st_size
        if size > _MAX_TEXT_BYTES:
            raise UsageError(f"{path}: {size / 1e6:.0f} MB of text is more than {_MAX_TEXT_BYTES >> 20} MiB; cut it.")
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); give a UTF-8 text file.") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: is not UTF-8 (byte {error.start}); convert it to UTF-8.") from error
    if not text.strip():
        raise UsageError(f"{path}: holds no text; give a UTF-8 text file.")
    return text


def open_tokenizer(*folders: Path) -> Any:
    """The tokenizer.json of the first folder that has one, or None.

    Raises CheckpointError when it cannot be read.
    """
    found = (companion(folder, "tokenizer.json") for folder in folders)
    return next((load_tokenizer(path) for path in found if path is not None), None)


def encode(tokenizer: Any, text: str, special: bool = False) -> Ids:
    """Token ids of ``text`` as int64."""
    return np.array(tokenizer.encode(text, add_special_tokens=special).ids, np.int64)


def make_sequences(tokenizer: Any, vocab_size: int, max_length: int, options: VerifyOptions) -> Sequences:
    """Windows that hold ``options.wanted_positions`` positions in all, and the prompts.

    Windows are spread over the shipped texts. Without a tokenizer both are random tokens from ``options.seed``.
    """
    wanted = options.wanted_positions
    window = min(128 if wanted < 1024 else 512, wanted, max_length)
    sizes = [window] * (wanted // window) + ([wanted % window] if wanted % window > 1 else [])
    room = max(max_length - options.wanted_greedy_tokens, 1)
    if tokenizer is None:
        if options.prompts is not None:
            raise UsageError(f"{options.prompts}: prompts need a tokenizer.json in the model folder; none is there.")
        rng = np.random.default_rng(options.seed)
        starts = [min(5 + 3 * index, room) for index in range(len(PROMPTS))]
        windows, prompts = ([rng.integers(0, vocab_size, size) for size in some] for some in (sizes, starts))
        return Sequences(windows, prompts, "random tokens")
    prompts = _prompts(tokenizer, options.prompts, room)
    corpora = [encode(tokenizer, read_text(path)[: 40 * wanted]) for path in sorted(texts().rglob("*.txt"))]
    if not corpora:
        corpora = [np.concatenate(prompts)]
    windows = [_cut(corpora[i % len(corpora)], i // len(corpora), size, options.seed) for i, size in enumerate(sizes)]
    origin = f"{min(len(corpora), len(windows))} shipped texts and {len(prompts)} prompts"
    for sequence in (*windows, *prompts):
        if sequence.max() >= vocab_size:
            raise UsageError(f"the tokenizer produces token {sequence.max()}, the model has {vocab_size}; they differ.")
    return Sequences(windows, prompts, origin)


def _prompts(tokenizer: Any, path: Path | None, room: int) -> list[Ids]:
    lines: Sequence[str] = PROMPTS
    if path is not None:
        lines = [line for line in read_text(path).splitlines() if line.strip()]
    encoded = [encode(tokenizer, line, special=True)[:room] for line in lines]
    return [ids for ids in encoded if len(ids)]


def _cut(corpus: Ids, turn: int, size: int, seed: int) -> Ids:
    """Window number ``turn`` of ``corpus``; windows start a prime stride apart so that they do not repeat."""
    start = (turn * size + 997 * seed) % max(len(corpus) - size, 1)
    cut = corpus[start : start + size]
    return np.resize(cut, size) if len(cut) < size else cut
