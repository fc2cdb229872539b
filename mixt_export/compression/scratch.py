"""Arrays that are too many for memory, on disk for the length of one run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mixt_export.staging import beside

#: Working arrays up to this size live in memory, bytes.
IN_MEMORY = 1 << 30


class Scratch:
    """Named arrays in a private folder. Plain reads and writes, no maps: resident memory is what the caller holds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Path] = {}

    def put(self, name: str, array: np.ndarray[Any, Any]) -> None:
        """Store ``array`` as ``name``, replacing what was there."""
        path = self._files.setdefault(name, self.folder / f"{len(self._files):06d}.npy")
        np.save(path, array, allow_pickle=False)

    def get(self, name: str) -> np.ndarray[Any, Any]:
        """The array called ``name``, read anew."""
        array: np.ndarray[Any, Any] = np.load(self._files[name], allow_pickle=False)
        return array

    def drop(self, name: str) -> None:
        """Free the disk space of ``name``."""
        path = self._files[name]
        path.unlink(missing_ok=True)

    def working_array(self, name: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        """A zeroed float32 array to work in: in memory up to IN_MEMORY bytes, beyond that mapped from a file.

        The system may write pages of a mapped array back when memory is short; one in memory it could only swap.
        """
        if 4 * int(np.prod(shape)) <= IN_MEMORY:
            return np.zeros(shape, np.float32)
        path = self._files.setdefault(name, self.folder / f"{len(self._files):06d}.npy")
        return np.memmap(path, np.float32, "w+", shape=shape)

    def __contains__(self, name: str) -> bool:
        return name in self._files and self._files[name].is_file()


@contextmanager
def scratch_beside(output: Path) -> Iterator[Scratch]:
    """A Scratch beside ``output`` (the disk that must hold the result anyway), removed on any exit."""
    output = output.absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    with beside(output, "scratch") as folder:
        yield Scratch(folder)
