"""Build an engine in a process of its own: a failed build leaves state behind that spoils later ones.

The process is the very script that a board runs, runtimes/tensorrt/build_engine.py; it reports in JSON lines.
"""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mixt_export.building.toolkit import bundle_folder, toolkit
from mixt_export.errors import MissingDependencyError, MixtError, ResourceError, UnsupportedError, UsageError
from mixt_export.progress import SILENT, Progress

_ERRORS: dict[int, type[MixtError]] = {
    error.exit_code: error for error in (MixtError, UsageError, UnsupportedError, ResourceError, MissingDependencyError)
}
_INTERRUPTED = 130
_KILLED = -9
_GRACE_SECONDS = 10


@dataclass(frozen=True)
class BuildReport:
    """A built engine. ``claim`` says in words what the build shows; ``sm`` such as 86, ``nbytes`` of the plan.

    ``log_memory``: figures in bytes that the library printed ("weights_bytes", and "profiles" one by one); they are
    that library's for that target, never the memory of a Jetson.
    """

    engine: Path
    claim: str
    library: str
    sm: int
    nbytes: int
    layers: int
    seconds: float
    log_memory: dict[str, Any]
    kernels: str = ""


def installed_backend() -> str:
    """The backend whose package is installed: "trt", else "rtx". Raises MissingDependencyError when neither is."""
    backends = toolkit("backends").BACKENDS
    for name, backend in backends.items():
        if importlib.util.find_spec(backend.module) is not None:
            return str(name)
    rtx, trt = backends["rtx"], backends["trt"]
    raise MissingDependencyError(
        f"building an engine needs {trt.label} (on the device) or {rtx.label} (here, without a GPU): "
        f"pip install 'mixt-export[rtx]', which is {rtx.install}; {trt.label}: {trt.install}."
    )


def build_engine(
    folder: Path | str,
    *,
    backend: str | None = None,
    sm: int | None = None,
    profiles: str = "one",
    workspace: str | None = None,
    timing_cache: Path | None = None,
    version_compatible: bool = False,
    hardware_compatible: bool = False,
    layer_outputs: bool = False,
    progress: Progress = SILENT,
) -> BuildReport:
    """Build the engine of an exported ``folder`` (target trt) into folder/engine/<sm>-<backend><version>/.

    backend: "trt" (TensorRT, for the GPU of this machine), "rtx" (TensorRT-RTX, for compute capability ``sm``, no GPU
    needed) or None: the one that is installed. profiles: "one" or "two". workspace: "512M", "2G". layer_outputs: a
    second engine that also puts out every block. Raises UsageError, UnsupportedError, ResourceError,
    MissingDependencyError; nothing half-written stays.
    """
    name = backend or installed_backend()
    if name not in toolkit("backends").BACKENDS:
        raise UsageError(f"--backend {name}: not a backend; choose from rtx, trt.")
    if profiles not in ("one", "two"):
        raise UsageError(f"--profiles {profiles}: choose one or two.")
    options = {"--backend": name, "--profiles": profiles, "--sm": sm, "--workspace": workspace}
    command = [sys.executable, str(bundle_folder() / "build_engine.py"), str(folder), "--events"]
    command += [f"{option}={value}" for option, value in options.items() if value is not None]
    command += [f"--timing-cache={timing_cache}"] if timing_cache is not None else []
    flags = {
        "--version-compatible": version_compatible,
        "--hardware-compatible": hardware_compatible,
        "--layer-outputs": layer_outputs,
    }
    command += [flag for flag, wanted in flags.items() if wanted]
    facts = _run(command, progress)
    return BuildReport(
        engine=Path(facts["engine"]),
        claim=facts["claim"],
        library=facts["library"],
        sm=facts["sm"],
        nbytes=facts["bytes"],
        layers=facts["layers"],
        seconds=facts["seconds"],
        log_memory=facts["log_memory"],
        kernels=facts["kernels"],
    )


def _run(command: list[str], progress: Progress) -> dict[str, Any]:
    """The last event of the process. Raises what the process reported, or how it died."""
    last: dict[str, Any] = {}
    with tempfile.TemporaryFile() as said, progress.task("building the engine") as advance:
        with _process(command, said) as process:
            assert process.stdout is not None
            for line in process.stdout:
                event = _event(line)
                if event is not None:
                    last = event
                    advance(1)
        code = process.returncode
        said.seek(max(0, said.seek(0, 2) - 4000))
        tail = said.read().decode("utf-8", errors="replace").strip().splitlines()
    if code == 0 and "engine" in last:
        return last
    if "error" in last:
        raise _ERRORS.get(int(last["exit_code"]), MixtError)(last["error"])
    if code == _INTERRUPTED:
        raise KeyboardInterrupt
    if code == _KILLED:
        raise ResourceError(
            "the build was killed, most likely for lack of memory; stop other programs, add swap, or export with a "
            "smaller --max-seq-len."
        )
    final = tail[-1].removeprefix("error: ").rstrip(".") if tail else "it said nothing"
    if code < 0:
        raise UnsupportedError(
            f"TensorRT crashed while building (signal {-code}; {final}); it cannot take this graph as it is: try the "
            "other --profiles, or export with the other --jetpack."
        )
    raise _ERRORS.get(code, MixtError)(f"the build ended with exit code {code}: {final}.")


@contextmanager
def _process(command: list[str], stderr: IO[bytes]) -> Iterator[subprocess.Popen[str]]:
    """The process; when we are interrupted it gets time to end cleanly, then it is killed."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)  # noqa: S603 - our own script
    try:
        yield process
        process.wait()
    except BaseException:
        process.send_signal(signal.SIGINT)  # a TERM would leave half an engine behind
        try:
            process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        raise
    finally:
        if process.stdout is not None:
            process.stdout.close()


def _event(line: str) -> dict[str, Any] | None:
    """The event in a line of output; libraries may print other lines."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) else None
