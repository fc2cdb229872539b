"""Engines on disk: a folder per target and version, with a sidecar that says what the engine is.

A plan is code for one GPU and one version of the library; a stamp that differs is refused before anything is loaded.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

try:
    import fcntl
except ModuleNotFoundError:  # not POSIX: nothing says whether a leftover is still being written, so none is touched
    fcntl = None  # type: ignore[assignment]

from .backends import Backend
from .builder import BuildSettings, Built
from .errors import OutOfMemoryError, TrtError
from .manifest import Manifest, Profile, digest, parse_profile, read_json

SCHEMA = 1
_NEW = ".tmp-"
ENGINE_FILE = "model.engine"
STAMP_FILE = "stamp.json"
FOLDER = "engine"
LAYERS_SUFFIX = "-layers"

_NOT_JETSON = (
    "printed by {library} while it compiled; figures of that library for that target, not the memory of a Jetson"
)


@dataclass(frozen=True)
class Stamp:
    """What an engine was built from and for; ``sm`` such as 86."""

    backend: str
    library: str
    sm: int
    graph: str
    profiles: tuple[Profile, ...]
    layer_outputs: tuple[str, ...]
    engine_bytes: int
    engine_sha256: str


def folder_name(backend: Backend, library: str, sm: int, layers: bool = False) -> str:
    """Name of the engine's folder: ``sm87-trt10.3.0``."""
    return f"sm{sm}-{backend.name}{library}{LAYERS_SUFFIX if layers else ''}"


def claim(backend: Backend, sm: int) -> str:
    """What a successful build shows, in the words that reports use."""
    if backend.chooses_target:
        return f"parsed and compiled by {backend.label} (SM{sm} proxy)"
    return f"built by {backend.label} for SM{sm}"


def write_engine(
    manifest: Manifest, backend: Backend, library: str, sm: int, settings: BuildSettings, built: Built
) -> Path:
    """Write engine and stamp to OUT/engine/<target>/, whole or not at all; returns the folder.

    Raises OutOfMemoryError when the disk is too small.
    """
    parent = manifest.folder / FOLDER
    parent.mkdir(exist_ok=True)
    size = int(built.plan.nbytes)
    free = shutil.disk_usage(parent).free
    if free < size + (16 << 20):
        raise OutOfMemoryError(f"{parent}: the engine needs {size / 1e6:.1f} MB of disk, {free / 1e6:.1f} MB are free.")
    target = parent / folder_name(backend, library, sm, bool(settings.layer_outputs))
    _clear_leftovers(parent)
    staging = Path(tempfile.mkdtemp(prefix=_NEW, dir=parent))
    lock = _locked(staging)
    try:
        with (staging / ENGINE_FILE).open("wb") as file:
            file.write(built.plan)
        facts = {
            "schema": SCHEMA,
            "claim": claim(backend, sm),
            "backend": backend.name,
            "library": library,
            "sm": sm,
            "host": platform.machine(),
            "graph": manifest.files["model.onnx"],
            "dialect": manifest.dialect,
            "dtype": manifest.dtype,
            "profiles": [profile.as_dict() for profile in settings.profiles],
            "layer_outputs": list(settings.layer_outputs),
            "kernels": list(settings.kernels),
            "workspace_bytes": settings.workspace,
            "engine": {"file": ENGINE_FILE, "bytes": size, "sha256": digest(staging / ENGINE_FILE)},
            "network_layers": built.layers,
            "build_seconds": round(built.seconds, 3),
            "log_memory": {"meaning": _NOT_JETSON.format(library=backend.label), **built.figures},
            "warnings": built.warnings[:64],
        }
        lines = (f" {json.dumps(key)}: {json.dumps(value)}" for key, value in facts.items())
        (staging / STAMP_FILE).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
        staging.chmod(0o755)
        if target.exists():
            shutil.rmtree(target)
        staging.replace(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if lock is not None:
            os.close(lock)
    return target


def _clear_leftovers(parent: Path) -> None:
    """Remove what killed builds left in ``parent``; the lock of a running one is held by its process."""
    for folder in parent.glob(f"{_NEW}*"):
        if folder.is_symlink() or not folder.is_dir():
            continue
        lock = _locked(folder)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _locked(folder: Path) -> int | None:
    """A descriptor that holds the lock of ``folder`` until it is closed or the process ends; None if it has it not."""
    descriptor = None
    try:
        if fcntl is not None:
            descriptor = os.open(folder, os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # somebody holds it; or another build took the folder for a leftover, or removed one
        if descriptor is not None:
            os.close(descriptor)
        return None
    return descriptor


def read_stamp(folder: Path) -> Stamp:
    """The stamp of the engine in ``folder``. Raises TrtError when it is missing or malformed."""
    path = folder / STAMP_FILE
    data = read_json(path)
    try:
        if data["schema"] != SCHEMA:
            raise TrtError(f"{path}: schema {data['schema']!r} is not {SCHEMA}; build the engine again.")
        return Stamp(
            backend=str(data["backend"]),
            library=str(data["library"]),
            sm=int(data["sm"]),
            graph=str(data["graph"]),
            profiles=tuple(parse_profile(profile) for profile in data["profiles"]),
            layer_outputs=tuple(str(name) for name in data["layer_outputs"]),
            engine_bytes=int(data["engine"]["bytes"]),
            engine_sha256=str(data["engine"]["sha256"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise TrtError(f"{path}: is no stamp of an engine ({error!r}); build the engine again.") from None


def find_engine(manifest: Manifest, backend: Backend, library: str, sm: int, layers: bool = False) -> Path:
    """Folder of the engine for this library and GPU. Raises TrtError naming what there is when it was not built."""
    folder = manifest.folder / FOLDER / folder_name(backend, library, sm, layers)
    if not folder.is_dir():
        there = sorted(path.name for path in (manifest.folder / FOLDER).glob("[!.]*") if path.is_dir())
        others = f"there are engines for {', '.join(there)}, which do not load here" if there else "no engine was built"
        option = " --layer-outputs" if layers else ""
        raise TrtError(f"{folder}: not found, {others}; run build_engine.py{option} on this device.")
    return folder


def load_plan(manifest: Manifest, folder: Path, backend: Backend, library: str, sm: int) -> tuple[Stamp, bytes]:
    """The stamp and the serialised engine in ``folder``.

    Raises TrtError, before the plan is read, when it was built from another graph, by another version or for another
    GPU, and when the file is not the one that was stamped.
    """
    stamp = read_stamp(folder)
    expected = {"backend": backend.name, "library": library, "sm": sm, "graph": manifest.files["model.onnx"]}
    for what, value in expected.items():
        found = getattr(stamp, what)
        if found != value:
            raise TrtError(
                f"{folder}: the engine was built for {what} {str(found)[:16]}, here it is {str(value)[:16]}; build it "
                "again with build_engine.py on this device."
            )
    path = folder / ENGINE_FILE
    if not path.is_file() or path.stat().st_size != stamp.engine_bytes or digest(path) != stamp.engine_sha256:
        raise TrtError(f"{path}: is not the file that {STAMP_FILE} describes; build the engine again.")
    return stamp, path.read_bytes()
