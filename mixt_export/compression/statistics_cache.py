"""Calibration statistics between runs, kept by the content of what they were measured on.

    <folder>/<kind>-<digest>/index.json     names, dtypes, shapes and SHA-256 of the arrays; written last
                             NNNN.bin       an array, row-major, little-endian
                             lock           held by whoever reads; a folder in use is not removed

An entry is written in a folder of its own (``.new-…``) and renamed when it is whole; every array is checked against its
digest before the first is used, and an entry that fails is removed and measured again. The least recently used entries
give way when all together exceed the limit.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mixt_export.checkpoints import Checkpoint
from mixt_export.sample.cache import cache_folder

try:
    import fcntl
except ModuleNotFoundError:  # not POSIX: nothing keeps a second run from removing an entry that is being read
    fcntl = None  # type: ignore[assignment]

#: Grows when entries of an older program must not be used.
FORMAT = 1
#: Bytes that all entries together may take.
LIMIT = 8 << 30
#: Moves the cache, or turns it "off"; by default it is the folder ``statistics`` of sample.cache.cache_folder.
VARIABLE = "MIXT_STATISTICS"

_INDEX, _NEW = "index.json", ".new-"
_PIECE = 1 << 24
#: Seconds after which whoever made a folder has locked it.
_SETTLED = 60.0


def statistics_folder() -> Path | None:
    """$MIXT_STATISTICS (None where it says "off"), else ``statistics`` in the user's cache folder. Touches nothing."""
    own = os.environ.get(VARIABLE)
    if own == "off":
        return None
    return Path(own).expanduser().absolute() if own else cache_folder() / "statistics"


def cache_of(choice: bool | str | Path) -> Path | None:
    """The folder that ``choice`` means: True ``statistics_folder``, False none, or the folder itself."""
    if isinstance(choice, bool):
        return statistics_folder() if choice else None
    return Path(choice).absolute()


def model_digest(checkpoint: Checkpoint) -> str:
    """SHA-256 over config.json and the name, dtype, shape and bytes of every tensor, however it is sharded."""
    digest = hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True).encode())
    for name in sorted(checkpoint.store):
        ref = checkpoint.store[name].ref
        digest.update(f"\n{name} {ref.dtype} {ref.shape} ".encode())
        for piece in checkpoint.store.chunks(name, _PIECE):
            digest.update(piece)
    return digest.hexdigest()


def array_digest(array: np.ndarray[Any, Any]) -> str:
    """SHA-256 of dtype, shape and values."""
    array = np.ascontiguousarray(array)
    digest = hashlib.sha256(f"{array.dtype.str} {array.shape} ".encode())
    digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def pack_symmetric(matrix: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The upper triangle of ``matrix`` (n, n), row by row: (n (n + 1) / 2,)."""
    return np.concatenate([row[index:] for index, row in enumerate(matrix)])


def unpack_symmetric(packed: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The symmetric matrix of ``pack_symmetric``."""
    size = int((np.sqrt(8 * len(packed) + 1) - 1) // 2)
    matrix = np.empty((size, size), packed.dtype)
    start = 0
    for index in range(size):
        row = packed[start : start + size - index]
        matrix[index, index:] = row
        matrix[index:, index] = row
        start += size - index
    return matrix


class Entry:
    """Named arrays in ``folder``. ``complete``: they were there already; otherwise put them all, then ``commit``."""

    def __init__(self, folder: Path, arrays: dict[str, dict[str, Any]] | None) -> None:
        self.folder = folder
        self.complete = arrays is not None
        self._arrays = arrays or {}

    def put(self, name: str, array: np.ndarray[Any, Any]) -> None:
        """Store ``array`` as ``name``."""
        array = np.ascontiguousarray(array)
        file = f"{len(self._arrays):04d}.bin"
        array.tofile(self.folder / file)
        self._arrays[name] = {
            "file": file,
            "dtype": array.dtype.str,
            "shape": array.shape,
            "sha256": array_digest(array),
        }

    def get(self, name: str) -> np.ndarray[Any, Any]:
        """The array called ``name``, read anew."""
        about = self._arrays[name]
        flat: np.ndarray[Any, Any] = np.fromfile(self.folder / about["file"], np.dtype(about["dtype"]))
        return flat.reshape(about["shape"])

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def commit(self) -> None:
        """Everything was put."""
        index = json.dumps({"format": FORMAT, "arrays": self._arrays})
        (self.folder / _INDEX).write_text(index, encoding="utf-8")
        self.complete = True

    def sound(self) -> bool:
        """Whether every array has its digest."""
        try:
            return all(array_digest(self.get(name)) == about["sha256"] for name, about in self._arrays.items())
        except (OSError, ValueError, KeyError, TypeError):
            return False


class StatisticsCache:
    """``folder`` None: nothing is kept. ``limit``: bytes of all entries together."""

    def __init__(self, folder: Path | None, limit: int = LIMIT) -> None:
        self.folder, self.limit = folder, limit
        self.hits: list[str] = []
        self._models: dict[Path, str] = {}

    def model(self, checkpoint: Checkpoint) -> str:
        """model_digest, worked out once."""
        if checkpoint.path not in self._models:
            self._models[checkpoint.path] = model_digest(checkpoint)
        return self._models[checkpoint.path]

    @staticmethod
    def versions() -> list[str]:
        """Of what computes the statistics: their last digits depend on it."""
        return [f"{name} {metadata.version(name)}" for name in ("torch", "transformers")]

    @contextmanager
    def entry(self, kind: str, facts: Mapping[str, Any], needed: int, scratch: Path) -> Iterator[Entry]:
        """The entry of ``kind`` measured on ``facts`` (JSON types that determine it), complete or new.

        A new one that would exceed the limit or the disk (``needed`` bytes) lives in ``scratch`` and is not kept, as
        does one where the cache cannot be written. One that is committed while open is kept after the block.
        """
        key = hashlib.sha256(json.dumps({"format": FORMAT, "kind": kind, **facts}, sort_keys=True).encode())
        name = f"{kind}-{key.hexdigest()[:40]}"
        found = None if self.folder is None else _opened(self.folder / name)
        if found is not None:
            entry, lock = found
            self.hits.append(kind)
            with lock:
                yield entry
            return
        with self._new(needed, scratch) as (entry, kept):
            yield entry
            if kept and entry.complete and self.folder is not None:
                with suppress(OSError):  # another run was faster
                    entry.folder.rename(self.folder / name)
                    self._trim()

    @contextmanager
    def _new(self, needed: int, scratch: Path) -> Iterator[tuple[Entry, bool]]:
        """An empty entry, and whether it lies in the cache."""
        parent, kept = scratch, False
        if self.folder is not None and needed <= self.limit:
            with suppress(OSError):
                self.folder.mkdir(parents=True, exist_ok=True)
                if shutil.disk_usage(self.folder).free > needed and os.access(self.folder, os.W_OK):
                    parent, kept = self.folder, True
        folder = Path(tempfile.mkdtemp(prefix=_NEW, dir=parent))
        try:
            with _held(folder):
                yield Entry(folder, None), kept
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _trim(self) -> None:
        """Remove what broken runs left, then the least recently used entries beyond the limit."""
        assert self.folder is not None
        aged = []
        for folder in self.folder.iterdir():
            if folder.name.startswith(_NEW):
                if time.time() - folder.stat().st_mtime > _SETTLED:
                    _remove(folder)
            elif (folder / _INDEX).is_file():
                aged.append(((folder / _INDEX).stat().st_mtime_ns, folder, _bytes(folder)))
        total = sum(size for _, _, size in aged)
        for _, folder, size in sorted(aged)[:-1]:
            if total <= self.limit:
                return
            if _remove(folder):
                total -= size


def _opened(folder: Path) -> tuple[Entry, BinaryIO] | None:
    """The complete entry in ``folder`` and its lock; None where there is none. A damaged one is removed."""
    try:
        lock = (folder / "lock").open("rb")
    except OSError:
        return None
    try:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        entry = Entry(folder, dict(index["arrays"]))
        if entry.sound():
            os.utime(folder / _INDEX)
            return entry, lock
    except (OSError, ValueError, KeyError, TypeError):
        pass
    lock.close()
    _remove(folder)
    return None


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Hold the lock of an entry's ``folder``, shared."""
    with (folder / "lock").open("wb") as lock:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_SH)
        yield


def _remove(folder: Path) -> bool:
    """Remove an entry unless somebody reads or writes it."""
    with suppress(OSError):
        with (folder / "lock").open("ab") as lock:
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
        return True
    return False


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
