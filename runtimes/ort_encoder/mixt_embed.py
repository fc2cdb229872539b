"""Sentence embeddings from an exported encoder: one file, numpy and onnxruntime; tokenizers only for text.

    encoder = Encoder("OUT")
    vectors = encoder.embed(["a sentence", "another one"])   # (2, hidden) float32, each of length 1

The folder's ``mixt_manifest.json`` says what the graph takes; see README.md beside this file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

SCHEMA = 1
_MAX_JSON_BYTES = 64 * 1024 * 1024
_BATCH = 16


class EncoderError(Exception):
    """The folder or the request cannot be used; the text is one sentence a user can act on."""


class Encoder:
    """An exported folder on the CPU. ``threads``: of onnxruntime, None for its own choice.

    Raises EncoderError when the folder is not an encoder that `mixt export` wrote, or its files are broken.
    """

    def __init__(self, folder: str | os.PathLike[str], *, threads: int | None = None) -> None:
        self.folder = Path(folder)
        manifest = _manifest(self.folder)
        self.max_length = _count(manifest.get("limits", {}).get("max_seq_len"), "limits.max_seq_len", self.folder)
        self.hidden_size = _count(manifest.get("model", {}).get("hidden_size"), "model.hidden_size", self.folder)
        pad = manifest.get("pad_token_id")
        self.pad = pad if isinstance(pad, int) and not isinstance(pad, bool) and pad >= 0 else 0
        self._session = _session(self.folder, threads)
        self._segments = any(found.name == "token_type_ids" for found in self._session.get_inputs())
        self._tokenizer: Any = None

    def tokenize(self, text: str) -> list[int]:
        """Token ids of ``text`` with the tokens that mark its ends, cut to ``max_length``."""
        if self._tokenizer is None:
            self._tokenizer = _tokenizer(self.folder, self.max_length)
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Unit embeddings (texts, hidden) float32. Texts of like length share a run; the order is kept."""
        return self.embed_ids([self.tokenize(text) for text in texts])

    def embed_ids(self, sequences: Sequence[Sequence[int]]) -> npt.NDArray[np.float32]:
        """The same for token ids. Raises EncoderError for an empty or too long sequence."""
        for number, ids in enumerate(sequences):
            if not 0 < len(ids) <= self.max_length:
                raise EncoderError(f"text {number}: has {len(ids)} tokens; the model takes 1 to {self.max_length}.")
        found = np.zeros((len(sequences), self.hidden_size), np.float32)
        order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
        for start in range(0, len(order), _BATCH):
            rows = order[start : start + _BATCH]
            found[rows] = self._run([sequences[row] for row in rows])["sentence_embedding"]
        return found

    def states(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Last hidden states (tokens, hidden) float32 of one sequence."""
        states: npt.NDArray[np.float32] = self._run([ids])["last_hidden_state"][0]
        return states

    def _run(self, sequences: Sequence[Sequence[int]]) -> dict[str, Any]:
        longest = max(len(ids) for ids in sequences)
        ids = np.full((len(sequences), longest), self.pad, np.int64)
        mask = np.zeros_like(ids)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)], mask[row, : len(sequence)] = sequence, 1
        feeds = {"input_ids": ids, "attention_mask": mask}
        if self._segments:
            feeds["token_type_ids"] = np.zeros_like(ids)
        names = ["last_hidden_state", "sentence_embedding"]
        try:
            outputs = self._session.run(names, feeds)
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise EncoderError(f"{self.folder}: onnxruntime failed ({_first_line(error)}).") from error
        if not np.isfinite(outputs[1]).all():
            raise EncoderError(f"{self.folder}: an embedding is not finite; the model or its export is broken.")
        return dict(zip(names, outputs, strict=True))


def _check_own(path: Path) -> None:
    """Raise EncoderError when ``path`` is a link out of its folder, unless into the blobs of a Hugging Face cache."""
    if not path.is_symlink():
        return
    home, target = path.parent.resolve(), path.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if home not in target.parents and blobs not in target.parents:
        raise EncoderError(f"{path}: is a link that leads out of the folder; put the file itself there.")


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / "mixt_manifest.json"
    if not path.is_file():
        raise EncoderError(f"{path}: no such file; give the folder that `mixt export` wrote.")
    _check_own(path)
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise EncoderError(f"{path}: is larger than any manifest; export the model again.")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise EncoderError(f"{path}: is not JSON ({_first_line(error)}); export the model again.") from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA or data.get("kind") != "encoder":
        raise EncoderError(f"{path}: does not describe an encoder of schema {SCHEMA}; export an encoder again.")
    for part in ("limits", "model"):
        if not isinstance(data.get(part), dict):
            raise EncoderError(f"{path}: {part} is missing; export the model again.")
    return data


def _count(value: Any, name: str, folder: Path) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 24:
        raise EncoderError(f"{folder / 'mixt_manifest.json'}: {name} is {value!r}, not a count; export again.")
    return value


def _session(folder: Path, threads: int | None) -> Any:
    try:
        import onnxruntime as ort
    except ModuleNotFoundError as error:
        raise EncoderError("running the model needs onnxruntime: pip install onnxruntime.") from error
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if threads is not None:
        options.intra_op_num_threads = threads
    path = folder / "model.onnx"
    if not path.is_file():
        raise EncoderError(f"{path}: no such file; give the folder that `mixt export` wrote.")
    _check_own(path)
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise EncoderError(f"{path}: onnxruntime refuses it ({_first_line(error)}); export again.") from error


def _tokenizer(folder: Path, longest: int) -> Any:
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        raise EncoderError("text needs tokenizers: pip install tokenizers; token ids work without.") from error
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise EncoderError(f"{path}: no such file; copy the original model's tokenizer.json there.")
    _check_own(path)
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception for every parse error
        raise EncoderError(f"{path}: is not a tokenizer ({_first_line(error)}).") from error
    tokenizer.no_padding()
    tokenizer.enable_truncation(longest)
    return tokenizer


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
