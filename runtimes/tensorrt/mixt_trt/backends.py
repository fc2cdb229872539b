"""The libraries that can build: TensorRT on the device, TensorRT-RTX on any x86-64 machine without a GPU."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import MissingLibraryError, NotSupportedError, TrtError

RTX_REQUIREMENT = "tensorrt-rtx-cu13==1.7.1.116"


@dataclass(frozen=True)
class Backend:
    """One library. ``chooses_target``: it builds for a named compute capability and needs no GPU to do so.

    ``unsupported``: options of build_engine.py that it has no use for, with what it does instead.
    """

    name: str
    module: str
    label: str
    install: str
    chooses_target: bool
    unsupported: Mapping[str, str]


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend(
            "trt",
            "tensorrt",
            "TensorRT",
            "on a Jetson `sudo apt-get install python3-libnvinfer libnvonnxparsers-dev` (JetPack), on a workstation "
            "`pip install tensorrt`",
            chooses_target=False,
            unsupported={},
        ),
        Backend(
            "rtx",
            "tensorrt_rtx",
            "TensorRT-RTX",
            f"`pip install {RTX_REQUIREMENT}`",
            chooses_target=True,
            unsupported={
                "--hardware-compatible": "its engines are for the compute capabilities they were built for",
                "--timing-cache": "it times nothing while building and would neither read nor write the file",
            },
        ),
    )
}

#: Built for unless asked otherwise: the nearest relative of Orin (SM87) that TensorRT-RTX knows.
DEFAULT_RTX_TARGET = 86


def backend_named(name: str) -> Backend:
    """The backend called ``name``. Raises TrtError listing what there is."""
    if name not in BACKENDS:
        raise TrtError(f"--backend {name}: not a backend; choose from {', '.join(sorted(BACKENDS))}.")
    return BACKENDS[name]


def load_backend(backend: Backend) -> Any:
    """Import the backend's module. Raises MissingLibraryError with the line that installs it."""
    try:
        return importlib.import_module(backend.module)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == backend.module:
            raise MissingLibraryError(
                f"{backend.label} (Python module {backend.module!r}) is not installed: {backend.install}."
            ) from None
        reason = str(error).strip().rstrip(".")
        raise MissingLibraryError(
            f"{backend.label} is installed but does not load ({reason}); install it again: {backend.install}."
        ) from error


def targets_of(module: Any) -> tuple[int, ...]:
    """Compute capabilities (86 for SM86) that ``module`` can be told to build for; none for full TensorRT."""
    known = getattr(module, "ComputeCapability", None)
    names = () if known is None else (name for name in dir(known) if name.startswith("SM") and name[2:].isdigit())
    return tuple(sorted(int(name[2:]) for name in names))


def chosen_target(backend: Backend, module: Any, asked: int | None) -> int | None:
    """The compute capability to build for, or None: that of the GPU in this machine.

    Raises NotSupportedError for one that this library cannot build for without the device.
    """
    if not backend.chooses_target:
        if asked is not None:
            raise NotSupportedError(
                f"--sm {asked}: {backend.label} builds only for the GPU it runs on; leave --sm out and build on the "
                "device."
            )
        return None
    wanted = DEFAULT_RTX_TARGET if asked is None else asked
    known = targets_of(module)
    if wanted not in known:
        names = ", ".join(f"SM{target}" for target in known)
        raise NotSupportedError(
            f"SM{wanted} cannot be built here: {backend.label} compiles for {names} only; build on the device with "
            "device/build_engine.py."
        )
    return wanted
