"""Tensors of a model folder, known from headers alone and read one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mixt_export.checkpoints import paths, strictjson
from mixt_export.checkpoints.dtypes import is_floating, largest, numpy_dtype
from mixt_export.checkpoints.header import read_header
from mixt_export.errors import CheckpointError, MixtError, UnsupportedError
from mixt_export.network import TensorRef

#: Bytes read at a time where a tensor is converted or copied in pieces: small enough for the cache of a core.
CHUNK = 1 << 20

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies: ``nbytes`` bytes from ``offset`` of the file ``path``, row-major, little-endian.

    ``linkable`` is False where an exported folder cannot point into ``path`` (it is no safetensors file of the folder).
    A virtual tensor lies nowhere: ``made()`` gives its value, a new array of shape ``ref.shape`` in float64 or
    ``ref.dtype``, at every call; ``path`` is then what messages name, ``offset`` 0, and it is never linked.
    """

    ref: TensorRef
    path: Path
    offset: int
    nbytes: int
    made: Callable[[], np.ndarray[Any, Any]] | None = None
    linkable: bool = True

    @property
    def in_file(self) -> bool:
        """Whether an exported folder can point at the bytes where they lie."""
        return self.made is None and self.linkable


class TensorStore(Mapping[str, StoredTensor]):
    """Mapping from tensor name to StoredTensor, in the order of the files and of their data.

    Reading goes through plain file reads, so that resident memory is what the caller holds; only ``array`` maps.
    Virtual tensors (StoredTensor.made) are read like the others; they are in memory whole while they are.
    """

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self._tensors = dict(tensors)

    def __getitem__(self, name: str) -> StoredTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @cached_property
    def refs(self) -> dict[str, TensorRef]:
        """Name, shape and dtype of every tensor."""
        return {name: stored.ref for name, stored in self._tensors.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold tensors, each once."""
        return tuple(dict.fromkeys(tensor.path for tensor in self._tensors.values() if tensor.made is None))

    def find(self, name: str) -> StoredTensor:
        """The tensor called ``name``; CheckpointError when the folder has none."""
        if name not in self._tensors:
            where = self.files[0].parent if self.files else "the model folder"
            raise CheckpointError(f"{where}: the tensor {name!r} is missing; download or write the model again.")
        return self._tensors[name]

    def read(self, name: str, dtype: str | None = None) -> np.ndarray[Any, Any]:
        """Tensor ``name`` as a new array in its stored dtype, or converted to ``dtype``.

        A conversion happens in pieces: peak memory is the result plus a few MB. Raises CheckpointError when the
        tensor or its bytes are missing, UnsupportedError when a finite value does not fit ``dtype``.
        """
        stored = self.find(name)
        wanted = dtype or stored.ref.dtype
        if stored.made is not None:
            value = _made(stored)
            return value if wanted == stored.ref.dtype else _convert(value, wanted, stored)
        result = np.empty(stored.ref.shape, numpy_dtype(wanted))
        if wanted == stored.ref.dtype and wanted != "bool":
            view = result.reshape(-1).view(np.uint8).data
            with stored.path.open("rb", buffering=0) as file:
                file.seek(stored.offset)
                _fill(file, view, stored)
            return result
        flat, position = result.reshape(-1), 0
        for piece in self.chunks(name):
            values = _decode(piece, stored)
            flat[position : position + values.size] = _convert(values, wanted, stored)
            position += values.size
        return result

    def chunks(self, name: str, limit: int = CHUNK) -> Iterator[bytes]:
        """The bytes of tensor ``name`` in pieces of at most ``limit`` bytes (whole elements), read, not mapped."""
        stored = self.find(name)
        itemsize = numpy_dtype(stored.ref.dtype).itemsize
        step = max(limit // itemsize, 1) * itemsize
        if stored.made is not None:
            view = _made(stored).reshape(-1).view(np.uint8).data
            yield from (bytes(view[begin : begin + step]) for begin in range(0, len(view), step))
            return
        with stored.path.open("rb") as file:
            file.seek(stored.offset)
            left = stored.nbytes
            while left:
                piece = file.read(min(step, left))
                if len(piece) != min(step, left):
                    raise _ends_inside(stored)
                left -= len(piece)
                yield piece

    def array(self, name: str) -> np.ndarray[Any, Any]:
        """Tensor ``name`` in its stored dtype, read-only: a view of the mapped file, or the value of a virtual one."""
        stored = self.find(name)
        dtype = numpy_dtype(stored.ref.dtype)
        if stored.made is not None:
            value = _made(stored)
            value.flags.writeable = False
            return value
        if not stored.nbytes:
            return np.empty(stored.ref.shape, dtype)
        return np.memmap(stored.path, dtype, "r", stored.offset, stored.ref.shape)


def open_store(folder: Path) -> TensorStore:
    """The tensors of ``folder``: model.safetensors, or the shards that model.safetensors.index.json lists."""
    single = paths.own_file(folder, SINGLE_FILE)
    if single is not None:
        return TensorStore(read_tensors(single))
    index = paths.required_file(folder, INDEX_FILE, "a model folder needs it or model.safetensors")
    return TensorStore(_sharded(folder, index))


def read_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file. Raises CheckpointError or UnsupportedError, see header.read_header."""
    return {
        name: StoredTensor(TensorRef(name, entry.shape, entry.dtype), path, entry.offset, entry.nbytes)
        for name, entry in read_header(path).entries.items()
    }


def _sharded(folder: Path, index: Path) -> dict[str, StoredTensor]:
    weight_map = strictjson.load_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index}: weight_map must map tensor names to file names; download the file again.")
    files = sorted(set(weight_map.values()))
    for file in files:
        if not paths.is_plain_name(file) or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{index}: {file!r} in weight_map is not the plain name of a safetensors file in the folder; "
                "paths are not followed: correct the index."
            )
    found = {file: paths.own_file(folder, file) for file in files}
    missing = [file for file, path in found.items() if path is None]
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(files)} shards are missing ({_listing(missing)}); download them too."
        )
    tensors: dict[str, StoredTensor] = {}
    for file, path in found.items():
        assert path is not None
        for name, stored in read_tensors(path).items():
            if name in tensors:
                raise CheckpointError(
                    f"{path}: tensor {name!r} is also in {tensors[name].path.name}; remove the shards of other models."
                )
            if weight_map.get(name) != file:
                raise CheckpointError(
                    f"{path}: holds the tensor {name!r}, which {index.name} does not place there; "
                    "download the shards and their index together again."
                )
            tensors[name] = stored
    absent = [name for name in weight_map if name not in tensors]
    if absent:
        raise CheckpointError(
            f"{index}: {len(absent)} of its tensors are in none of the shards ({_listing(absent)}); "
            "download the shards and their index together again."
        )
    return tensors


def _listing(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown}, …"


def _fill(file: Any, view: memoryview, stored: StoredTensor) -> None:
    """Read exactly ``len(view)`` bytes; CheckpointError when the file ends (it shrank since its header was read)."""
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            raise _ends_inside(stored)
        done += count


def _made(stored: StoredTensor) -> np.ndarray[Any, Any]:
    """The value of a virtual tensor in its stored dtype, contiguous. MixtError when it is not what was announced."""
    assert stored.made is not None
    value = stored.made()
    if value.shape != stored.ref.shape or value.dtype.name not in (stored.ref.dtype, "float64"):
        raise MixtError(
            f"{stored.path}: tensor {stored.ref.name!r} was announced as {stored.ref.dtype} {stored.ref.shape} and "
            f"made as {value.dtype.name} {value.shape}. Please report this."
        )
    if value.dtype.name != stored.ref.dtype:
        value = _convert(value, stored.ref.dtype, stored)
    return np.ascontiguousarray(value).reshape(stored.ref.shape)


def _ends_inside(stored: StoredTensor) -> CheckpointError:
    return CheckpointError(
        f"{stored.path}: ends inside the tensor {stored.ref.name!r}; the file changed while it was read: "
        "run again when nothing writes to it."
    )


def _decode(piece: bytes, stored: StoredTensor) -> np.ndarray[Any, Any]:
    """``piece`` as a flat array in the stored dtype. A bool byte other than 0 and 1 has no meaning to numpy."""
    if stored.ref.dtype == "bool":
        raw = np.frombuffer(piece, np.uint8)
        if raw.max(initial=0) > 1:
            raise CheckpointError(
                f"{stored.path}: tensor {stored.ref.name!r} of dtype bool holds bytes other than 0 and 1; "
                "download the file again."
            )
        return raw.view(np.bool_)
    return np.frombuffer(piece, numpy_dtype(stored.ref.dtype))


def _convert(values: np.ndarray[Any, Any], dtype: str, stored: StoredTensor) -> np.ndarray[Any, Any]:
    """``values`` in ``dtype``; UnsupportedError when a finite value becomes infinite."""
    source = values.dtype.name
    if source == "bfloat16" and dtype == "float32":  # the upper half of a float32: a shift instead of a cast
        widened: np.ndarray[Any, Any] = values.view(np.uint16).astype(np.uint32)
        widened <<= 16
        return widened.view(np.float32)
    with np.errstate(over="ignore"):
        result = values.astype(numpy_dtype(dtype))
    if is_floating(dtype) and is_floating(source) and largest(dtype) < largest(source):
        wide = result.astype(np.float32)
        if not np.isfinite(wide).all() and np.isfinite(values[~np.isfinite(wide)].astype(np.float64)).any():
            raise UnsupportedError(
                f"{stored.path}: tensor {stored.ref.name!r} holds values that do not fit {dtype} "
                f"(largest {largest(dtype):g}); choose a wider dtype."
            )
    return result
