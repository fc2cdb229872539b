"""Tensors of a file of torch.save, where they lie in it; loaded as data, see pickles."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mixt_export.checkpoints import pickles
from mixt_export.checkpoints.dtypes import numpy_dtype
from mixt_export.checkpoints.pickle_values import Global, Record, TensorView
from mixt_export.checkpoints.store import StoredTensor
from mixt_export.checkpoints.torch_zip import Archive, read_archive
from mixt_export.errors import CheckpointError, UnsupportedError
from mixt_export.network import TensorRef

#: torch's storages -> numpy names; others (complex, quantised, float8) are not handled.
_DTYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
#: Modules of a pickled model, at most, and values of its settings: what a file refers to repeatedly counts repeatedly.
_MODULES = 500_000
_LONGEST_NAME = 4096
_SETTINGS = 100_000
#: Times that each byte may belong to a tensor, on average: a basis is shared by the layers of its group.
_SHARED = 256
_DEEPEST = 64
_AGAIN = "download the file again"


@dataclass(frozen=True)
class TorchFile:
    """A file of torch.save: ``value`` holds plain containers, pickles.Record and pickles.TensorView."""

    path: Path
    value: Any
    archive: Archive

    def stored(self, view: TensorView, name: str) -> StoredTensor:
        """``view`` as a tensor called ``name``: in place where it is contiguous, else gathered when it is read.

        Raises CheckpointError when it reaches beyond its storage, UnsupportedError for a dtype that is not handled.
        """
        dtype, offset = self._place(view, name)
        ref = TensorRef(name, view.shape, dtype)
        if is_contiguous(view):
            return StoredTensor(ref, self.path, offset, ref.nbytes, linkable=False)
        return StoredTensor(ref, self.path, 0, ref.nbytes, self._gather(view, dtype, offset), linkable=False)

    def stored_transposed(self, view: TensorView, name: str) -> StoredTensor:
        """The transpose of the matrix ``view``; in place where ``view`` is one, as ``matrix.t()`` is saved."""
        if len(view.shape) != 2:
            raise CheckpointError(f"{self.path}: {name!r} has shape {view.shape}, a matrix is expected; {_AGAIN}.")
        turned = TensorView(view.storage, view.offset, view.shape[::-1], view.strides[::-1])
        return self.stored(turned, name)

    def _place(self, view: TensorView, name: str) -> tuple[str, int]:
        storage = view.storage
        if storage.kind not in _DTYPES:
            raise UnsupportedError(
                f"{self.path}: tensor {name!r} lies in a {storage.kind}, which is not handled; start from float32, "
                "float16 or bfloat16 weights."
            )
        dtype = _DTYPES[storage.kind]
        itemsize = numpy_dtype(dtype).itemsize
        entry = self.archive.storages.get(storage.key)
        last = sum((size - 1) * step for size, step in zip(view.shape, view.strides, strict=True))
        needed = view.offset + last + 1 if math.prod(view.shape) else view.offset
        if entry is None or needed > storage.numel or storage.numel * itemsize > entry.nbytes:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} needs {needed} elements of the storage {storage.key!r}, which has "
                f"{0 if entry is None else entry.nbytes // itemsize}; the file is corrupt: {_AGAIN}."
            )
        return dtype, entry.offset + view.offset * itemsize

    def _gather(self, view: TensorView, dtype: str, offset: int) -> Callable[[], np.ndarray[Any, Any]]:
        kind = numpy_dtype(dtype)
        if math.prod(view.shape) > view.storage.numel:
            # A small storage expanded to a huge tensor is no weight of a model.
            raise CheckpointError(
                f"{self.path}: a tensor of shape {view.shape} is made of only {view.storage.numel} numbers; {_AGAIN}."
            )
        span = sum((size - 1) * step for size, step in zip(view.shape, view.strides, strict=True)) + 1

        def gather() -> np.ndarray[Any, Any]:
            flat = np.fromfile(self.path, kind, span, offset=offset)
            if flat.size != span:
                raise CheckpointError(f"{self.path}: ends inside a tensor; {_AGAIN}.")
            if kind.kind == "b" and flat.view(np.uint8).max(initial=0) > 1:
                raise CheckpointError(f"{self.path}: a tensor of bools holds bytes other than 0 and 1; {_AGAIN}.")
            strides = [step * kind.itemsize for step in view.strides]
            return np.lib.stride_tricks.as_strided(flat, view.shape, strides, writeable=False).copy()

        return gather


def open_torch_file(path: Path) -> TorchFile:
    """Read the file of torch.save at ``path`` as data. Raises what torch_zip.read_archive and pickles.load raise."""
    archive = read_archive(path)
    return TorchFile(path, pickles.load(archive.pickle, str(path)), archive)


def is_contiguous(view: TensorView) -> bool:
    """Whether the elements lie row-major one behind the other; strides of axes of size 1, or of no element, do not."""
    if not math.prod(view.shape):
        return True
    expected = 1
    for size, step in zip(reversed(view.shape), reversed(view.strides), strict=True):
        if size > 1 and step != expected:
            return False
        expected *= size
    return True


def is_tensors(value: Any) -> bool:
    """Whether ``value`` is a state_dict: a mapping of names to tensors."""
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(name, str) and isinstance(tensor, TensorView) for name, tensor in value.items())
    )


def tensors_of(file: TorchFile, views: Mapping[str, TensorView]) -> dict[str, StoredTensor]:
    """``views`` by name where they lie in ``file``. CheckpointError where they share storage without end."""
    found = {name: file.stored(view, name) for name, view in views.items()}
    total, size = sum(stored.nbytes for stored in found.values()), file.path.stat().st_size
    if total > _SHARED * size:
        raise CheckpointError(
            f"{file.path}: its {len(found)} tensors would take {total} bytes, more than {_SHARED} times the file; "
            f"{_AGAIN}."
        )
    return found


def is_module(value: Any) -> bool:
    """Whether ``value`` is a pickled torch module."""
    return isinstance(value, Record) and isinstance(value.state.get("_modules"), dict)


def modules_of(module: Record, what: str) -> Iterator[tuple[str, Record]]:
    """Every module below ``module`` with its dotted name, itself first under the name ``""``."""
    stack: list[tuple[str, Record, int]] = [("", module, 0)]
    count = 0  # of children, modules or not: they may be shared, and are looked at each time
    while stack:
        name, current, depth = stack.pop()
        children = current.state.get("_modules")
        count += len(children) if isinstance(children, dict) else 0
        if depth > _DEEPEST or count > _MODULES or len(name) > _LONGEST_NAME:
            raise CheckpointError(f"{what}: its modules are nested without end; {_AGAIN}.")
        yield name, current
        for key, child in reversed(list(children.items())) if isinstance(children, dict) else ():
            if isinstance(key, str | int) and is_module(child):
                stack.append((f"{name}.{key}" if name else str(key), child, depth + 1))


def state_of(module: Record, what: str) -> dict[str, TensorView]:
    """Parameters and persistent buffers of a pickled module by dotted name, as ``module.state_dict()`` gives them."""
    found: dict[str, TensorView] = {}
    count = 0
    for name, current in modules_of(module, what):
        listed = current.state.get("_non_persistent_buffers_set")
        volatile = {key for key in listed if isinstance(key, str)} if isinstance(listed, list) else set()
        for kind in ("_parameters", "_buffers"):
            values = current.state.get(kind)
            count += len(values) if isinstance(values, dict) else 0
            if count > _MODULES:
                raise CheckpointError(f"{what}: its modules have more than {_MODULES} parameters; {_AGAIN}.")
            for key, value in values.items() if isinstance(values, dict) else ():
                if (
                    isinstance(value, TensorView)
                    and isinstance(key, str)
                    and (kind != "_buffers" or key not in volatile)
                ):
                    found[f"{name}.{key}" if name else key] = value
    return found


def settings_of(record: Any) -> dict[str, Any]:
    """The public attributes of a pickled configuration that JSON can hold; a dtype becomes its name."""
    found: dict[str, Any] = {}
    budget = [_SETTINGS]
    for key, value in record.state.items() if isinstance(record, Record) else ():
        if not key.startswith("_"):
            try:
                found[key] = _plain(value, 0, budget)
            except _NotPlainError:
                continue
    return found


class _NotPlainError(Exception):
    """A value that JSON cannot hold."""


def _plain(value: Any, depth: int, budget: list[int]) -> Any:
    """``value`` in JSON's types. ``budget``: how many more values may be looked at."""
    budget[0] -= 1 + (len(value) if isinstance(value, list | tuple | dict) else 0)
    if depth > _DEEPEST or budget[0] < 0 or (isinstance(value, float) and not math.isfinite(value)):
        raise _NotPlainError
    if isinstance(value, Global) and value.module == "torch":
        return value.name
    if isinstance(value, list | tuple):
        return [_plain(item, depth + 1, budget) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str | int) for key in value):
        return {str(key): _plain(item, depth + 1, budget) for key, item in value.items()}
    if value is None or isinstance(value, str | float) or (isinstance(value, int) and abs(value) < 2**63):
        return value
    raise _NotPlainError
