"""The folder of compiled kernels beside a graph: an index in JSON and one PTX file each, checked before use."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .errors import TrtError
from .manifest import check_own, read_json

FOLDER = "kernels"
INDEX_FILE = "index.json"
SCHEMA = 1
_MAX_PTX_BYTES = 4 << 20
#: What one block may have on every device, and what a launch may ask for without raising a limit.
_MAX_THREADS, _MAX_SHARED = 1024, 49152


@dataclass(frozen=True)
class KernelFile:
    """A compiled kernel: the name of its entry, threads per block, dynamic shared memory in bytes."""

    path: Path
    sha256: str
    entry: str
    threads: int
    shared: int

    def ptx(self) -> str:
        """The text. Raises TrtError when it is not the file that the index describes."""
        check_own(self.path)
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise TrtError(f"{self.path}: cannot be read ({error.strerror}); copy the folder again.") from None
        if len(data) > _MAX_PTX_BYTES or hashlib.sha256(data).hexdigest() != self.sha256:
            raise TrtError(
                f"{self.path}: is not the file that {INDEX_FILE} describes (SHA-256 differs); copy the folder again, "
                "or build with --no-kernels."
            )
        return data.decode("ascii", errors="replace")


@dataclass(frozen=True)
class KernelIndex:
    """``operators``: those whose every node has a kernel here; ``kernels``: by the name that tactics.Kernel has."""

    operators: tuple[str, ...]
    kernels: Mapping[str, KernelFile]


def read_index(folder: Path) -> KernelIndex | None:
    """The kernels in ``folder``, None where there are none. Raises TrtError for an index that cannot be true."""
    path = folder / INDEX_FILE
    if not path.is_file():
        return None
    data = read_json(path)
    if data.get("schema") != SCHEMA:
        raise TrtError(
            f"{path}: schema {data.get('schema')!r} is not {SCHEMA}; export again, or build with --no-kernels."
        )
    try:
        kernels = {str(name): _kernel(folder, facts) for name, facts in data["kernels"].items()}
        operators = tuple(_name(operator) for operator in data["operators"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise TrtError(
            f"{path}: is no index of kernels ({error!r}); export again, or build with --no-kernels."
        ) from None
    return KernelIndex(operators, kernels)


def _kernel(folder: Path, facts: Mapping[str, object]) -> KernelFile:
    file = _name(facts["file"])
    if file != Path(file).name or file.startswith("."):
        raise ValueError(f"{file!r} is no plain file name")
    threads, shared = facts["threads"], facts["shared"]
    if not (isinstance(threads, int) and isinstance(shared, int)):
        raise TypeError("threads and shared are no numbers")
    if not (0 < threads <= _MAX_THREADS and threads % 32 == 0 and 0 <= shared <= _MAX_SHARED):
        raise ValueError(f"{threads} threads with {shared} bytes of shared memory cannot be launched")
    return KernelFile(folder / file, _name(facts["sha256"]), _name(facts["entry"]), threads, shared)


def _name(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise TypeError(f"{value!r} is no text")
    return value
