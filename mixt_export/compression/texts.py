"""Calibration tokens: texts cut into windows of one length, several texts mixed evenly."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mixt_export.checkpoints import companion
from mixt_export.compression.report import TextReport
from mixt_export.errors import CheckpointError, UsageError
from mixt_export.resources import texts as shipped_texts
from mixt_export.tokenizer import load_tokenizer

#: Of a longer file the first so many bytes are used: calibration needs thousands of tokens, not a library.
MAX_TEXT_BYTES = 16 * 2**20


def default_texts() -> list[Path]:
    """The calibration texts that travel with the package.

    Raises UsageError when none are installed.
    """
    found = sorted(shipped_texts().glob("calib_*.txt"))
    if not found:
        raise UsageError(f"{shipped_texts()}: no calib_*.txt is installed; name a text with --calib.")
    return found


def open_tokenizer(folder: Path) -> Any:
    """The `tokenizers.Tokenizer` of a model folder.

    Raises CheckpointError when tokenizer.json is missing or not a tokenizer.
    """
    path = companion(folder, "tokenizer.json")
    if path is None:
        missing = folder / "tokenizer.json"
        raise CheckpointError(f"{missing}: missing; calibration needs the model's tokenizer.json in its folder.")
    return load_tokenizer(path)


def read_text(path: Path) -> tuple[str, str]:
    """Text and SHA-256 of the file's used bytes.

    Raises UsageError when it is missing, empty, or not UTF-8.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_TEXT_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{path}: cannot read the calibration text ({error.strerror}).") from error
    cut = len(data) > MAX_TEXT_BYTES
    data = data[:MAX_TEXT_BYTES]
    try:
        text = data.decode("utf-8", errors="ignore" if cut and _cut_inside_character(data) else "strict")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text (byte {error.start}); convert it, e.g. with iconv.") from error
    return text, hashlib.sha256(data).hexdigest()


def _cut_inside_character(data: bytes) -> bool:
    """Whether the only thing wrong with ``data`` as UTF-8 is a last character cut in two."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start >= len(data) - 3
    return False


def calibration_windows(
    folder: Path, texts: Sequence[Path], count: int, length: int, vocabulary: int
) -> tuple[np.ndarray, list[TextReport]]:
    """Up to ``count`` windows of ``length`` tokens, int64 (windows, length), the texts taken in turn.

    Windows of one text do not overlap and are spread evenly over it; no special tokens are added. Texts that are too
    short for their share leave it to the others. The order interleaves the texts, so any prefix is a fair mixture.
    Raises UsageError when no text gives a single window, CheckpointError when a token is outside the vocabulary.
    """
    tokenizer = open_tokenizer(folder)
    streams, digests = [], []
    for path in texts:
        text, digest = read_text(path)
        streams.append(np.asarray(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64))
        digests.append(digest)
    shares = even_shares([len(stream) // length for stream in streams], count)
    if sum(shares) == 0:
        names = ", ".join(str(path) for path in texts)
        raise UsageError(
            f"{names}: no calibration tokens: {sum(map(len, streams))} tokens give no window of {length}; "
            "give a longer text with --calib."
        )
    cut = [_spread(stream, share, length) for stream, share in zip(streams, shares, strict=True)]
    windows = np.stack([part[turn] for turn in range(max(shares)) for part in cut if turn < len(part)])
    if int(windows.max()) >= vocabulary:
        raise CheckpointError(
            f"{folder}: tokenizer.json gives token {int(windows.max())}, but the model has {vocabulary}; "
            "the tokenizer belongs to another model."
        )
    reports = [
        TextReport(str(path), digest, len(stream), share)
        for path, digest, stream, share in zip(texts, digests, streams, shares, strict=True)
    ]
    return windows, reports


def even_shares(available: Sequence[int], count: int) -> list[int]:
    """Split ``count`` evenly over texts of ``available`` windows; what one cannot give the others do, if they can."""
    shares = [0] * len(available)
    while sum(shares) < count:
        open_texts = [index for index, have in enumerate(available) if shares[index] < have]
        if not open_texts:
            return shares
        for index in open_texts[: count - sum(shares)]:
            shares[index] += 1
    return shares


def _spread(stream: np.ndarray, share: int, length: int) -> list[np.ndarray]:
    """``share`` windows, the first at the start, spaced evenly over the whole stream without overlap."""
    if share == 0:
        return []
    last = len(stream) - length
    starts = [0] if share == 1 else [round(index * last / (share - 1)) for index in range(share)]
    return [stream[start : start + length] for start in starts]
