"""Tensors that lie in the weight files in parts: the beginning in 8 bits, the rest in 16 (Dobi-SVD's remapping).

Of both factors of a rank k linear (m, n) the first min(m, n) rows are stored as int8 with one float32 scale per column,
the others as float16, so that a factorised linear takes max(m, n) · k numbers of 16 bits instead of (m + n) · k
(arXiv 2502.02723; "remap" of arXiv 2604.02119). It is a way of storing: whoever reads the folder gets ordinary factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mixt_export.checkpoints.store import StoredTensor, TensorStore
from mixt_export.errors import CheckpointError
from mixt_export.network import TensorRef

SCHEME = "remap8"
_KEYS = {"scheme", "dtype", "axis"}
_DTYPES = ("float32", "float16", "bfloat16")
_LARGEST = 127


@dataclass(frozen=True)
class Packed:
    """The matrix ``ref`` in parts: ``rows`` rows in 8 bits, the others in 16; rows lie along ``axis``."""

    ref: TensorRef
    axis: int
    rows: int

    @property
    def parts(self) -> tuple[TensorRef, ...]:
        """What is stored: int8 of the first rows, their scales, and float16 of the rest where there is one."""
        name, columns = self.ref.name, self.ref.shape[1 - self.axis]
        rest = self.ref.shape[self.axis] - self.rows
        stored = [
            TensorRef(f"{name}.int8", self._shape(self.rows), "int8"),
            TensorRef(f"{name}.scale", (columns,), "float32"),
        ]
        if rest:
            stored.append(TensorRef(f"{name}.rest", self._shape(rest), "float16"))
        return tuple(stored)

    @property
    def nbytes(self) -> int:
        """Bytes that are stored."""
        return sum(ref.nbytes for ref in self.parts)

    def pack(self, values: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
        """The arrays of ``parts`` for ``values``, of the shape of ``ref``: nearest multiples of absmax / 127."""
        rows = np.moveaxis(values.astype(np.float64), self.axis, 0)
        first = rows[: self.rows]
        scale = (np.abs(first).max(axis=0) / _LARGEST).astype(np.float32)
        steps = np.divide(first, scale, out=np.zeros_like(first), where=scale > 0)
        stored = [np.moveaxis(np.clip(np.rint(steps), -_LARGEST, _LARGEST).astype(np.int8), 0, self.axis), scale]
        if len(rows) > self.rows:
            stored.append(np.moveaxis(rows[self.rows :].astype(np.float16), 0, self.axis))
        return [np.ascontiguousarray(part) for part in stored]

    def unpack(self, parts: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
        """The matrix that ``parts`` stand for, float64."""
        scale = np.expand_dims(parts[1].astype(np.float64), self.axis)
        return np.concatenate([parts[0] * scale, *(part.astype(np.float64) for part in parts[2:])], axis=self.axis)

    def to_json(self) -> dict[str, Any]:
        """What mixt_factors.json says of it; the rest follows from the parts."""
        return {"scheme": SCHEME, "dtype": self.ref.dtype, "axis": self.axis}

    def _shape(self, rows: int) -> tuple[int, ...]:
        columns = self.ref.shape[1 - self.axis]
        return (rows, columns) if self.axis == 0 else (columns, rows)


def unpacked(store: TensorStore, described: Mapping[str, Any], path: Path) -> TensorStore:
    """``store`` with the tensors of ``described`` (name -> to_json) in place of their parts, made when they are read.

    Raises CheckpointError naming ``path`` for parts that are missing or do not fit each other.
    """
    tensors = dict(store)
    for name, value in described.items():
        packed = _from_json(store, name, value, path)
        for part in packed.parts:
            tensors.pop(part.name, None)
        tensors[name] = StoredTensor(
            packed.ref, path, 0, packed.ref.nbytes, made=partial(_made, store, packed), linkable=False
        )
    return TensorStore(tensors)


def _made(store: TensorStore, packed: Packed) -> np.ndarray[Any, Any]:
    return packed.unpack([store.read(part.name) for part in packed.parts])


def _from_json(store: TensorStore, name: str, value: Any, path: Path) -> Packed:
    where = f"{path}: the packed tensor {name!r}"
    again = "write the folder again with mixt compress"
    if (
        not isinstance(value, dict)
        or set(value) != _KEYS
        or value["scheme"] != SCHEME
        or value["dtype"] not in _DTYPES
        or type(value["axis"]) is not int
        or value["axis"] not in (0, 1)
    ):
        raise CheckpointError(f"{where} is not described by scheme {SCHEME!r}, dtype and axis 0 or 1; {again}.")
    first = store.refs.get(f"{name}.int8")
    if name in store or first is None or len(first.shape) != 2:
        raise CheckpointError(f"{where} needs the matrix {name}.int8 and no tensor of its own name; {again}.")
    axis = value["axis"]
    rest = store.refs.get(f"{name}.rest")
    rows = first.shape[axis] + (rest.shape[axis] if rest is not None and len(rest.shape) == 2 else 0)
    shape = (rows, first.shape[1]) if axis == 0 else (first.shape[0], rows)
    packed = Packed(TensorRef(name, shape, value["dtype"]), axis, first.shape[axis])
    for part in packed.parts:
        found = store.refs.get(part.name)
        if found != part:
            has = "is missing" if found is None else f"is {found.dtype} {found.shape}"
            raise CheckpointError(f"{where} needs {part.name!r} as {part.dtype} {part.shape}, which {has}; {again}.")
    return packed
