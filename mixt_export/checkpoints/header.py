"""Strict reader of safetensors headers.

Format: u64 little-endian N, N bytes of JSON object {name: {"dtype", "shape", "data_offsets": [begin, end]}, ...,
"__metadata__": {str: str}}, then the data, which the tensors cover exactly, without holes or overlaps
(https://github.com/huggingface/safetensors, "Format"). Nothing is allocated from what a header claims: every claim is
checked against the size of the file first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixt_export.checkpoints import strictjson
from mixt_export.checkpoints.dtypes import NAME_OF_CODE, UNHANDLED_CODES, numpy_dtype
from mixt_export.errors import CheckpointError, UnsupportedError

#: Largest header that safetensors itself accepts.
MAX_HEADER_BYTES = 100_000_000
#: numpy cannot hold more axes.
MAX_AXES = 32
_MAX_ELEMENTS = 2**48
_AGAIN = "download or write the file again"


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file: ``offset`` counts from the start of the file; ``dtype`` is a numpy name."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """What the header of one safetensors file says; ``entries`` in the order of the data."""

    entries: dict[str, Entry]
    metadata: dict[str, str]
    data_start: int
    file_bytes: int


def read_header(path: Path) -> Header:
    """Read and check the header of the safetensors file at ``path``.

    Raises CheckpointError when the file is not what the format says, UnsupportedError for a dtype that is valid
    but not handled.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise CheckpointError(f"{path}: holds {size} bytes, too few for a safetensors file; {_AGAIN}.")
        length = int.from_bytes(start, "little")
        if length > MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{path}: claims a header of {length} bytes, more than the {MAX_HEADER_BYTES} that safetensors allows; "
                f"it is corrupt or no safetensors file: {_AGAIN}."
            )
        if length > size - 8:
            raise CheckpointError(
                f"{path}: claims a header of {length} bytes, but the file has only {size}; it is truncated: {_AGAIN}."
            )
        text = file.read(length)
    if not text.startswith(b"{"):
        raise CheckpointError(f"{path}: its header is not a JSON object; it is corrupt: {_AGAIN}.")
    fields = strictjson.parse_object(text, str(path))
    metadata = _metadata(path, fields.pop("__metadata__", {}))
    data_start = 8 + length
    available = size - data_start
    entries = {name: _entry(path, name, field, data_start, available) for name, field in fields.items()}
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)))
    _check_coverage(path, ordered, data_start, size)
    return Header(ordered, metadata, data_start, size)


def _metadata(path: Path, value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise CheckpointError(f"{path}: __metadata__ in its header must map strings to strings; {_AGAIN}.")
    return value


def _entry(path: Path, name: str, field: Any, data_start: int, available: int) -> Entry:
    where = f"{path}: tensor {name!r}"
    if not name:
        raise CheckpointError(f"{path}: a tensor has an empty name; {_AGAIN}.")
    if not isinstance(field, dict) or set(field) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} must be described by exactly dtype, shape and data_offsets; {_AGAIN}.")
    dtype = _dtype(where, field["dtype"])
    shape = field["shape"]
    if not _are_sizes(shape) or len(shape) > MAX_AXES:
        raise CheckpointError(
            f"{where} has a shape that is not a list of at most {MAX_AXES} sizes of 0 or more: "
            f"{_short(shape)}; {_AGAIN}."
        )
    if math.prod(size for size in shape if size) > _MAX_ELEMENTS:
        raise CheckpointError(f"{where} has the impossible shape {_short(shape)}; {_AGAIN}.")
    offsets = field["data_offsets"]
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where} has data_offsets that are not [begin, end]: {_short(offsets)}; {_AGAIN}.")
    begin, end = offsets
    if end > available:
        raise CheckpointError(
            f"{where} claims bytes {begin} to {end}, but the file has only {available} bytes of data; "
            f"it is truncated: {_AGAIN}."
        )
    expected = math.prod(shape) * numpy_dtype(dtype).itemsize
    if end - begin != expected:
        raise CheckpointError(
            f"{where} of dtype {dtype} and shape {tuple(shape)} needs {expected} bytes, "
            f"but its data_offsets span {end - begin}; {_AGAIN}."
        )
    return Entry(dtype, tuple(shape), data_start + begin, expected)


def _dtype(where: str, code: Any) -> str:
    if isinstance(code, str) and code in NAME_OF_CODE:
        return NAME_OF_CODE[code]
    if isinstance(code, str) and code in UNHANDLED_CODES:
        raise UnsupportedError(
            f"{where} has dtype {code}, which this version does not handle; start from float32, float16 or "
            "bfloat16 weights."
        )
    raise CheckpointError(f"{where} has the unknown dtype {_short(code)}; {_AGAIN}.")


def _check_coverage(path: Path, ordered: dict[str, Entry], data_start: int, size: int) -> None:
    """Raise CheckpointError unless ``ordered`` covers the file from ``data_start`` to its end exactly."""
    position, before = data_start, "the header"
    for name, entry in ordered.items():
        if entry.offset != position:
            problem = "overlaps" if entry.offset < position else "leaves a hole after"
            raise CheckpointError(f"{path}: tensor {name!r} {problem} {before}; the file is corrupt: {_AGAIN}.")
        position, before = entry.offset + entry.nbytes, f"tensor {name!r}"
    if position != size:
        raise CheckpointError(
            f"{path}: {size - position} bytes after {before} belong to no tensor; the file is corrupt: {_AGAIN}."
        )


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
