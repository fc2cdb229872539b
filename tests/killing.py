"""End a piece of work with SIGKILL at a random moment, as a power cut or the kernel's memory guard would."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

Digests = dict[str, str]


def killed(work: Callable[[], None], seconds: float) -> bool:
    """Run ``work`` in a copy of this process that is killed after ``seconds``; whether it had finished by then."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) == 0


def digests(folder: Path) -> Digests:
    """SHA-256 of every file below ``folder`` by its relative path."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def leftovers(parent: Path) -> list[str]:
    """Hidden folders in ``parent``."""
    return [path.name for path in parent.iterdir() if path.name.startswith(".")]


def write_plan(folder: Path, plan: bytes) -> Path:
    """Store ``plan`` as the engine of the exported TensorRT ``folder``, as a build does after it compiled."""
    from mixt_export.building.toolkit import toolkit

    manifest = toolkit("manifest").read_manifest(folder)
    backend = toolkit("backends").BACKENDS["trt"]
    settings: Any = SimpleNamespace(profiles=manifest.profiles, layer_outputs=(), kernels=(), workspace=1)
    built: Any = SimpleNamespace(plan=np.frombuffer(plan, np.uint8), layers=1, seconds=1.0, figures={}, warnings=[])
    target: Path = toolkit("stamp").write_engine(manifest, backend, "10.3.0", 87, settings, built)
    return target


def engine_is_whole(folder: Path) -> bool:
    """Whether the engine in ``folder`` is the one that its stamp describes."""
    facts = json.loads((folder / "stamp.json").read_text())["engine"]
    data = (folder / facts["file"]).read_bytes()
    return len(data) == facts["bytes"] and hashlib.sha256(data).hexdigest() == facts["sha256"]
