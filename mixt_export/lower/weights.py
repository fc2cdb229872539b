"""Weights of an exported graph: by reference into the checkpoint's files where dtype and layout allow, else streamed.

Nothing is read while the graph is built. A weight is *in place* when it is one tensor, or several tensors that lie side
by side in one file, stored in the graph's dtype and wanted in the stored layout. Everything else is listed as a
`Streamed` entry and written, tensor by tensor, by `write_streamed`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from mixt_export.checkpoints import Checkpoint, StoredTensor
from mixt_export.checkpoints.dtypes import largest, numpy_dtype
from mixt_export.errors import CheckpointError, MixtError, UnsupportedError
from mixt_export.progress import SILENT, Progress

STREAMED_FILE = "model.onnx.data"
_ALIGNMENT = 64

Derive = Callable[[Callable[[str], np.ndarray[Any, Any]]], np.ndarray[Any, Any]]
"""Makes a tensor, given a function that loads stored tensors by name."""

DTYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
}

#: What a streamed tensor may hold: weights, indices of Gather, and codes of quantised weights.
_ELEMENTS = {
    **DTYPES,
    "int32": ir.DataType.INT32,
    "uint8": ir.DataType.UINT8,
    "int8": ir.DataType.INT8,
    "int4": ir.DataType.INT4,
}

_NAMES = {element: name for name, element in _ELEMENTS.items()}


def itemsize(dtype: str) -> int:
    """Bytes of one element of the graph dtype ``dtype``, or of int32."""
    return int(_ELEMENTS[dtype].itemsize)


def _nbytes(shape: Sequence[int], dtype: str) -> int:
    return -(-prod(shape) * int(_ELEMENTS[dtype].itemsize * 8) // 8)


@dataclass(frozen=True)
class Streamed:
    """A weight to be written to the streamed file: where, and how to make it."""

    name: str
    offset: int
    nbytes: int
    parts: tuple[Callable[[], np.ndarray[Any, Any]], ...]


@dataclass
class Weights:
    """Turns tensor names into initializers with external data, and keeps the list of what must be linked or written."""

    checkpoint: Checkpoint
    dtype: str
    linked: set[Path] = field(default_factory=set)
    streamed: list[Streamed] = field(default_factory=list)
    parts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Filled in: name of a graph's tensor -> the stored tensors that it is, stacked along their first axis."""
    flipped: set[str] = field(default_factory=set)
    """Filled in: names of those that are transposed behind the stacking."""
    sources: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Filled in: name of a tensor that was computed from stored ones -> those."""
    _known: dict[str, ir.TensorProtocol] = field(default_factory=dict)
    _end: int = 0

    @property
    def streamed_bytes(self) -> int:
        """Size of the streamed file."""
        return self._end

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a stored tensor. Raises CheckpointError when it is missing."""
        return self._stored(name).ref.shape

    def expect(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise CheckpointError unless the stored tensor ``name`` has the ``shape`` that config.json implies."""
        found = self.shape(name)
        if found != shape:
            raise CheckpointError(
                f"{self.checkpoint.path}: tensor {name!r} has shape {list(found)}, config.json wants {list(shape)}."
            )

    def in_place(self, names: Sequence[str]) -> bool:
        """Whether ``names``, stacked along axis 0, can be pointed at where they lie."""
        stored = [self._stored(name) for name in names]
        if any(tensor.ref.dtype != self.dtype or not tensor.in_file for tensor in stored):
            return False
        return all(
            after.path == before.path
            and after.offset == before.offset + before.nbytes
            and after.ref.shape[1:] == before.ref.shape[1:]
            for before, after in pairwise(stored)
        )

    def refer(self, names: Sequence[str], name: str) -> ir.TensorProtocol:
        """The tensors ``names`` stacked along axis 0, in place; call only where `in_place` holds."""
        stored = [self._stored(part) for part in names]
        self.linked.add(stored[0].path)
        self.parts[name] = tuple(names)
        shape = (sum(tensor.ref.shape[0] for tensor in stored), *stored[0].ref.shape[1:])
        nbytes = sum(tensor.nbytes for tensor in stored)
        return self._external(stored[0].path.name, stored[0].offset, nbytes, shape, name)

    def tensor(self, name: str) -> ir.TensorProtocol:
        """One stored tensor in its stored layout: in place when the dtype is right, else streamed and converted."""
        return self.stacked([name], name)

    def viewed(self, name: str, shape: Sequence[int]) -> ir.TensorProtocol:
        """One stored tensor with its elements in their stored order, as ``shape``: in place when the dtype is right."""
        stored = self._stored(name).ref
        if tuple(shape) == stored.shape:
            return self.tensor(name)
        label = f"{name}.{'x'.join(map(str, shape))}"
        self.parts[label] = (name,)
        if not self.in_place([name]):
            return self._stream([name], shape, label, transpose=False)
        found = self._stored(name)
        self.linked.add(found.path)
        return self._external(found.path.name, found.offset, found.nbytes, shape, label)

    def transposed(self, names: Sequence[str], name: str) -> ir.TensorProtocol:
        """Matrices (out, in) stacked along their outputs and transposed to (in, sum of out), streamed."""
        shapes = [self.shape(part) for part in names]
        self.flipped.add(name)
        return self._stream(names, (shapes[0][1], sum(shape[0] for shape in shapes)), name, transpose=True)

    def stacked(self, names: Sequence[str], name: str) -> ir.TensorProtocol:
        """Tensors stacked along axis 0: in place when they lie side by side, else streamed."""
        if self.in_place(names):
            return self.refer(names, name)
        shapes = [self.shape(part) for part in names]
        return self._stream(names, (sum(shape[0] for shape in shapes), *shapes[0][1:]), name, transpose=False)

    def piled(self, names: Sequence[str], name: str, *, transpose: bool) -> ir.TensorProtocol:
        """Matrices of one shape along a new first axis: (a, b) -> (count, a, b), or (count, b, a) with ``transpose``.

        In place where they lie side by side in the wanted layout, else streamed one by one. Raises CheckpointError when
        their shapes differ.
        """
        rows, columns = self.shape(names[0])
        for other in names:
            self.expect(other, (rows, columns))
        if not transpose and self.in_place(names):
            stored = [self._stored(part) for part in names]
            self.linked.add(stored[0].path)
            self.parts[name] = tuple(names)
            nbytes = sum(tensor.nbytes for tensor in stored)
            shape = (len(names), rows, columns)
            return self._external(stored[0].path.name, stored[0].offset, nbytes, shape, name)
        shape = (len(names), *((columns, rows) if transpose else (rows, columns)))
        return self._append(name, shape, self.dtype, tuple(_late(self._converted, part, transpose) for part in names))

    def computed(self, name: str, array: np.ndarray[Any, Any]) -> ir.TensorProtocol:
        """A tensor that is no weight of the checkpoint (rotary tables, indices), streamed in its own dtype."""
        return self._append(name, array.shape, str(array.dtype), (lambda: array,))

    def derived(self, name: str, shape: Sequence[int], sources: Sequence[str], make: Derive) -> ir.TensorProtocol:
        """A tensor of the graph's dtype computed from stored ones, streamed.

        ``make(load)`` gives it in float64, of ``shape``; ``load(source)`` reads one of ``sources`` as float32. Raises
        CheckpointError when a source is missing; writing raises UnsupportedError when a value does not fit the dtype.
        """
        for source in sources:
            self._stored(source)
        self.sources[name] = tuple(sources)
        return self._append(name, shape, self.dtype, (lambda: self._computed(name, tuple(shape), make),))

    def _computed(self, name: str, shape: tuple[int, ...], make: Derive) -> np.ndarray[Any, Any]:
        wide = make(lambda source: self.checkpoint.store.read(source, "float32"))
        if wide.shape != shape:
            raise MixtError(f"{name}: was made of shape {wide.shape}, planned as {shape}. Please report this.")
        dtype = numpy_dtype(self.dtype)
        if wide.size and max(-wide.min(), wide.max()) > largest(self.dtype):
            raise UnsupportedError(
                f"{name}: merged weights do not fit {self.dtype} (largest {largest(self.dtype):g}); "
                "choose a wider dtype."
            )
        return np.ascontiguousarray(wide, dtype)

    def packed(
        self, name: str, shape: Sequence[int], dtype: str, make: Callable[[], np.ndarray[Any, Any]]
    ) -> ir.TensorProtocol:
        """A tensor of integers or scales, streamed; ``make()`` gives its bytes (two int4 in one)."""
        return self._append(name, shape, dtype, (make,))

    def reader(self, tensor: ir.TensorProtocol) -> Callable[[], np.ndarray[Any, Any]]:
        """What gives the value of a tensor that this object made, anew at every call, in the graph's layout."""
        parts, shape = self._makers(str(tensor.name)), tensor.shape.numpy()
        return lambda: np.concatenate([part().reshape(-1) for part in parts]).reshape(shape)

    def change(self, name: str, how: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]) -> None:
        """Write ``how`` of the value of the streamed tensor ``name``, of the same shape, instead of it."""
        read = self.reader(self._known[name])
        place = next(index for index, entry in enumerate(self.streamed) if entry.name == name)
        self.streamed[place] = replace(self.streamed[place], parts=(lambda: how(read()),))

    def rearrange(self, kept: Mapping[str, ir.TensorProtocol]) -> dict[str, ir.TensorProtocol]:
        """Forget every tensor that is not in ``kept`` (by name), close the gaps, point at no file of the checkpoint.

        What is left of a checkpoint whose matrices were quantised is small: it is written anew instead of keeping files
        that nothing else reads. Returns the new places by name. Raises MixtError for a tensor of another maker.
        """
        makers = {name: self._makers(name) for name in kept}
        self._known, self.streamed, self._end = {}, [], 0
        self.linked.clear()
        for name, tensor in kept.items():
            self._append(name, tensor.shape.numpy(), _NAMES[tensor.dtype], makers[name])
        return dict(self._known)

    def _makers(self, name: str) -> tuple[Callable[[], np.ndarray[Any, Any]], ...]:
        entry = next((entry for entry in self.streamed if entry.name == name), None)
        if entry is not None:
            return entry.parts
        if name not in self.parts:
            raise MixtError(f"{name}: where this tensor came from is not known. Please report this.")
        return tuple(_late(self._converted, part, False) for part in self.parts[name])

    def _stored(self, name: str) -> StoredTensor:
        try:
            return self.checkpoint.store[name]
        except KeyError:
            raise CheckpointError(
                f"{self.checkpoint.path}: tensor {name!r} is missing; the weights do not belong to this config.json, "
                "or the download is incomplete."
            ) from None

    def _external(
        self, location: str, offset: int, nbytes: int, shape: Sequence[int], name: str, dtype: str | None = None
    ) -> ir.TensorProtocol:
        return ir.ExternalTensor(
            location, offset, nbytes, _ELEMENTS[dtype or self.dtype], shape=ir.Shape(list(shape)), name=name
        )

    def _stream(self, names: Sequence[str], shape: Sequence[int], name: str, *, transpose: bool) -> ir.TensorProtocol:
        self.parts[name] = tuple(names)
        if transpose and len(names) > 1:
            # Columns of several matrices interleave in memory: they are joined in one go.
            return self._append(name, shape, self.dtype, (lambda: self._joined(names),))
        return self._append(name, shape, self.dtype, tuple(_late(self._converted, part, transpose) for part in names))

    def _append(
        self, name: str, shape: Sequence[int], dtype: str, parts: tuple[Callable[[], np.ndarray[Any, Any]], ...]
    ) -> ir.TensorProtocol:
        if name not in self._known:  # a tied embedding is asked for twice and written once
            nbytes = _nbytes(shape, dtype)
            self.streamed.append(Streamed(name, self._end, nbytes, parts))
            self._known[name] = self._external(STREAMED_FILE, self._end, nbytes, shape, name, dtype)
            self._end = -(-(self._end + nbytes) // _ALIGNMENT) * _ALIGNMENT
        return self._known[name]

    def _converted(self, name: str, transpose: bool) -> np.ndarray[Any, Any]:
        array = self.checkpoint.store.read(name, self.dtype)
        return np.ascontiguousarray(array.T) if transpose else array

    def _joined(self, names: Sequence[str]) -> np.ndarray[Any, Any]:
        return np.ascontiguousarray(np.concatenate([self._converted(name, False) for name in names]).T)


def _late(make: Callable[[str, bool], np.ndarray[Any, Any]], name: str, transpose: bool) -> Callable[[], Any]:
    return lambda: make(name, transpose)


def write_streamed(weights: Weights, folder: Path, progress: Progress = SILENT) -> None:
    """Write the streamed file into ``folder``, one tensor in memory at a time. Does nothing when all is in place."""
    if not weights.streamed:
        return
    with (
        (folder / STREAMED_FILE).open("wb") as file,
        progress.task("writing weights", len(weights.streamed)) as advance,
    ):
        for entry in weights.streamed:
            file.seek(entry.offset)
            for part in entry.parts:
                array = part()
                file.write(array.reshape(-1).view(np.uint8).data)  # bfloat16 has no buffer of its own
                del array
            advance(1)
        file.truncate(weights.streamed_bytes)
