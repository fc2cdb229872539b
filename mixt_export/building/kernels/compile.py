"""Compile Triton kernels ahead of time, without a GPU, to PTX that TensorRT's plugins can launch."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mixt_export.building.toolkit import bundle_folder
from mixt_export.errors import MissingDependencyError, MixtError
from mixt_export.progress import SILENT, Progress

#: Triton appends pointers to scratch memory that our kernels do not use and TensorRT does not pass.
HIDDEN_PARAMETERS = 2

_ENTRY = re.compile(r"\.visible \.entry (?P<name>[\w$]+)\((?P<parameters>[^)]*)\)")
_PARAMETER = re.compile(r"[\w$]+_param_(?P<number>\d+)")
_COMMENT = re.compile(r"[ \t]*//.*$", re.MULTILINE)
_BLANK = re.compile(r"\n\s*\n")


@dataclass(frozen=True)
class Compiled:
    """``kernel`` (a tactics.Kernel) as PTX. ``shared``: bytes of dynamic shared memory, ``threads`` per block."""

    kernel: Any
    ptx: str
    entry: str
    shared: int
    threads: int

    @property
    def sha256(self) -> str:
        """Digest of the PTX text."""
        return hashlib.sha256(self.ptx.encode()).hexdigest()


@dataclass(frozen=True)
class Failed:
    """A kernel that the compiler refused, with its words."""

    kernel: Any
    reason: str


def triton_version() -> str | None:
    """Version of the installed Triton, None without one."""
    return None if importlib.util.find_spec("triton") is None else version("triton")


def sources_folder() -> Path:
    """The Triton sources: runtimes/tensorrt/kernels."""
    return bundle_folder() / "kernels"


def environment(cache: Path) -> dict[str, str]:
    """Settings under which equal sources give equal PTX: no path in it, nothing taken from an older cache."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    own = {"TRITON_DISABLE_LINE_INFO": "1", "TRITON_DEFAULT_FP_FUSION": "1", "TRITON_CACHE_DIR": str(cache)}
    return {**kept, **own, "OMP_NUM_THREADS": "1"}


def compile_kernels(kernels: Sequence[Any], progress: Progress = SILENT) -> Iterator[Compiled | Failed]:
    """Compile ``kernels`` (tactics.Kernel) one after another, in a process of their own.

    Yields in the order given. Raises MissingDependencyError without Triton, MixtError when the process dies.
    """
    if not kernels:
        return
    if triton_version() is None:
        raise MissingDependencyError(
            "compiling kernels needs the Python package 'triton', which is not installed: "
            "pip install 'mixt-export[kernels]'."
        )
    command = [sys.executable, "-m", "mixt_export.building.kernels.worker", str(sources_folder().parent)]
    with (
        tempfile.TemporaryDirectory(prefix="mixt-kernels-") as scratch,
        tempfile.TemporaryFile() as said,
        progress.task("compiling kernels", len(kernels)) as advance,
        subprocess.Popen(  # noqa: S603 - our own module
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            env=environment(Path(scratch)),
        ) as process,
    ):
        assert process.stdin is not None and process.stdout is not None
        try:
            for kernel in kernels:
                process.stdin.write(json.dumps({**asdict(kernel), "absent": kernel.absent}) + "\n")
                process.stdin.flush()
                line = process.stdout.readline()
                if not line:
                    said.seek(0)
                    tail = said.read().decode(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
                    raise MixtError(
                        f"{kernel.name}: the compiler's process ended ({tail[0][:300]}). Please report this."
                    )
                yield finished(kernel, json.loads(line))
                advance(1)
        except BrokenPipeError:
            raise MixtError(f"{kernel.name}: the compiler's process ended. Please report this.") from None
        finally:
            process.kill()


def finished(kernel: Any, answer: dict[str, Any]) -> Compiled | Failed:
    """The worker's ``answer`` with the hidden parameters gone and the entry renamed after the kernel."""
    if "error" in answer:
        return Failed(kernel, answer["error"])
    name = "mixt_" + re.sub(r"\W", "_", kernel.name)
    try:
        ptx = strip_hidden(answer["ptx"])
    except ValueError as error:
        return Failed(kernel, str(error))
    ptx = re.sub(rf"\b{re.escape(answer['entry'])}(?=\b|_param_)", name, ptx)
    ptx = _BLANK.sub("\n", _COMMENT.sub("", ptx)).lstrip()
    return Compiled(kernel, ptx, name, int(answer["shared"]), int(answer["threads"]))


def strip_hidden(ptx: str) -> str:
    """``ptx`` without the last HIDDEN_PARAMETERS parameters of its entry. Raises ValueError where it reads one."""
    entry = _ENTRY.search(ptx)
    if entry is None:
        raise ValueError("its PTX has no entry")
    parameters = entry["parameters"].strip("\n").split(",\n")
    kept, hidden = parameters[:-HIDDEN_PARAMETERS], parameters[-HIDDEN_PARAMETERS:]
    body = ptx[entry.end() :]
    for declaration in hidden:
        found = _PARAMETER.search(declaration)
        if found is None or ".u64" not in declaration:
            raise ValueError(f"its last parameters are not Triton's scratch pointers: {declaration.strip()}")
        if re.search(rf"\b{re.escape(found[0])}\b", body):
            raise ValueError(f"it uses Triton's scratch memory ({found[0]}), which TensorRT does not provide")
    return ptx[: entry.start("parameters")] + "\n" + ",\n".join(kept) + "\n" + ptx[entry.end("parameters") :]
