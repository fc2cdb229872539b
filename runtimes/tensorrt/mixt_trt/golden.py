"""Golden tensors: what PyTorch computed at export, as .npy files and one JSON file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import TrtError
from .manifest import Manifest, check_own, read_json

SCHEMA = 1
FOLDER = "golden"
FILE = "golden.json"

#: Arrays of a case, each in NAME.<array>.npy, float32.
ARRAYS = ("logits", "hidden", "cache")


@dataclass(frozen=True)
class Case:
    """One sequence: the first ``prompt`` of ``tokens`` go in at once, the others one by one.

    ``logits`` (1 + len(tokens) - prompt, vocab): after the prompt and after each further token. ``hidden`` (layers,
    len(tokens)): Euclidean norm of each block's output per position. ``cache`` (layers, 2, len(tokens)): norm of keys
    and of values over heads and features.
    """

    name: str
    tokens: tuple[int, ...]
    prompt: int
    logits: npt.NDArray[np.float32]
    hidden: npt.NDArray[np.float32]
    cache: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Golden:
    """All cases, and the relative L2 errors that the engine may make in logits and in norms."""

    cases: tuple[Case, ...]
    logits_tolerance: float
    norms_tolerance: float
    reference: str


def read_golden(folder: Path, manifest: Manifest) -> Golden:
    """Read a golden ``folder``. Raises TrtError when it is missing, malformed or of another model than ``manifest``."""
    path = folder / FILE
    if not folder.is_dir():
        raise TrtError(
            f"{folder}: no such folder; golden tensors are recorded where an export is verified: export the model "
            "again without --no-verify."
        )
    data = read_json(path)
    try:
        if data["schema"] != SCHEMA:
            raise TrtError(f"{path}: schema {data['schema']!r} is not {SCHEMA}; export the model again.")
        if data["graph"] != manifest.files["model.onnx"]:
            raise TrtError(f"{path}: was recorded for another {manifest.graph.name}; export the model again.")
        return Golden(
            cases=_cases(folder, data["cases"], manifest),
            logits_tolerance=_tolerance(data["tolerance"]["logits"]),
            norms_tolerance=_tolerance(data["tolerance"]["norms"]),
            reference=str(data["reference"]),
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise TrtError(f"{path}: is no record of golden tensors ({error!r}); export the model again.") from None


def _cases(folder: Path, listed: Any, manifest: Manifest) -> tuple[Case, ...]:
    if not listed:
        raise ValueError("it names no case")
    return tuple(_case(folder, facts, manifest) for facts in listed)


def _case(folder: Path, facts: Any, manifest: Manifest) -> Case:
    name, tokens, prompt = str(facts["name"]), tuple(int(token) for token in facts["tokens"]), int(facts["prompt"])
    if name != Path(name).name or name.startswith(".") or not 0 < prompt <= len(tokens):
        raise ValueError(f"case {name!r}")
    logits, hidden, cache = (_array(folder / f"{name}.{array}.npy") for array in ARRAYS)
    layers, length = manifest.layers, len(tokens)
    shapes = (1 + length - prompt, manifest.vocab_size), (layers, length), (layers, 2, length)
    if (logits.shape, hidden.shape, cache.shape) != shapes:
        raise ValueError(f"case {name!r} has shapes {logits.shape}, {hidden.shape}, {cache.shape}, not {shapes}")
    return Case(name, tokens, prompt, *(np.array(array) for array in (logits, hidden, cache)))


def _tolerance(value: Any) -> float:
    """A relative error that means something: anything passes a bar of 1, and nothing is compared by NaN."""
    if not 0.0 < float(value) < 1.0:
        raise ValueError(f"a tolerance of {value!r}")
    return float(value)


def _array(path: Path) -> npt.NDArray[np.float32]:
    """Mapped, not read: what a header claims is compared with what was expected before memory is taken for it."""
    check_own(path)
    try:
        # Not np.load, which takes a file that begins like a zip or a pickle for one.
        array: npt.NDArray[np.float32] = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # numpy parses the header as Python, and raises whatever its parser does
        raise TrtError(f"{path}: cannot be read ({error}); export the model again.") from None
    if array.dtype != np.float32:
        raise ValueError(f"{path.name} is {array.dtype}, not float32")
    return array
