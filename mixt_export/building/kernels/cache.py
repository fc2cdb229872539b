"""Compiled kernels kept between exports: equal sources and an equal compiler give equal text."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mixt_export.building.kernels import gates, worker
from mixt_export.building.kernels.compile import Compiled, Failed, compile_kernels, sources_folder, triton_version
from mixt_export.progress import SILENT, Progress
from mixt_export.sample import cache_folder


def obtain(kernels: Sequence[Any], progress: Progress = SILENT) -> Iterator[Compiled | Failed]:
    """Each of ``kernels`` (tactics.Kernel) compiled and through its gates, from the cache where it is there.

    One that a gate stops is Failed, with the gate and its reason. Raises as compile_kernels.
    """
    folder = cache_folder() / "kernels"
    version = _version()
    found = {kernel.name: _read(folder, version, kernel) for kernel in kernels}
    missing = [kernel for kernel in kernels if found[kernel.name] is None]
    for compiled in compile_kernels(missing, progress):
        if isinstance(compiled, Failed):
            yield compiled
            continue
        faults = gates.inspect(compiled).faults
        if faults:
            yield Failed(compiled.kernel, f"{faults[0].gate}: {faults[0].reason}")
            continue
        _write(folder, version, compiled)
        found[compiled.kernel.name] = compiled
    yield from (compiled for compiled in found.values() if compiled is not None)


def _version() -> str:
    """Everything that a kernel's text depends on besides its constants."""
    state = hashlib.sha256(f"{triton_version()} {worker.COMPUTE_CAPABILITY} {worker.PTX_VERSION}".encode())
    for path in sorted(sources_folder().glob("*.py")):
        state.update(path.read_bytes())
    return state.hexdigest()


def _path(folder: Path, version: str, kernel: Any) -> Path:
    text = json.dumps([version, asdict(kernel)])
    return folder / f"{kernel.name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def _read(folder: Path, version: str, kernel: Any) -> Compiled | None:
    """The kernel as it was written; None where it is not there, or not whole."""
    try:
        facts = json.loads(_path(folder, version, kernel).read_text(encoding="utf-8"))
        digest = facts.pop("sha256")
        found = Compiled(kernel, **facts)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return found if found.sha256 == digest else None


def _write(folder: Path, version: str, compiled: Compiled) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    facts = {name: getattr(compiled, name) for name in ("ptx", "entry", "shared", "threads", "sha256")}
    with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".tmp", delete=False, encoding="utf-8") as file:
        json.dump(facts, file)
    Path(file.name).replace(_path(folder, version, compiled.kernel))
