"""Build the engine of an exported folder on the machine that will run it: python3 device/build_engine.py OUT.

Exit codes: 0 built, 2 bad folder or option, 4 TensorRT cannot take the graph, 5 memory or disk, 6 TensorRT is missing.
"""

from __future__ import annotations

import argparse
import errno
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mixt_trt.backends import BACKENDS, Backend, backend_named, chosen_target, load_backend
from mixt_trt.builder import BuildSettings, build
from mixt_trt.cuda import open_cuda
from mixt_trt.errors import NotSupportedError, TrtError
from mixt_trt.kernel_files import FOLDER as KERNELS
from mixt_trt.manifest import Manifest, check_files, merged, read_manifest
from mixt_trt.plugins import use_kernels
from mixt_trt.stamp import claim, write_engine
from mixt_trt.trtexec import trtexec_command

_UNITS = {"K": 10, "M": 20, "G": 30}


def size_in_bytes(text: str) -> int:
    """ "512M" or "2G" (powers of 1024) or a plain number of bytes. Raises TrtError."""
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].upper() in _UNITS else (text, "")
    size = int(number) << _UNITS.get(unit, 0) if number.isdecimal() and len(number) < 20 else 0
    if not 0 < size < 1 << 63:
        raise TrtError(f"--workspace {text}: give a size such as 512M or 2G.")
    return size


def layer_output_names(manifest: Manifest) -> tuple[str, ...]:
    """Tensors that hold the output of each block; the exporter gives them these names."""
    return tuple(f"/model/layers.{index}/output" for index in range(manifest.layers))


def main(arguments: list[str] | None = None, *, module: Any = None, cuda: Any = None) -> int:
    """Parse ``arguments``, build, write engine and stamp; ``module`` and ``cuda`` replace the installed libraries."""
    parser = argparse.ArgumentParser(description="Build the TensorRT engine of an exported folder.")
    parser.add_argument("folder", nargs="?", help="the exported folder (default: the one this script lies in)")
    parser.add_argument("--backend", default="trt", help=f"one of {', '.join(BACKENDS)} (default: trt)")
    parser.add_argument("--sm", type=int, help="rtx only: compute capability to compile for (default: 86)")
    parser.add_argument(
        "--profiles", choices=("one", "two"), default="one", help="one: weights are held once (default)"
    )
    parser.add_argument("--workspace", help="most scratch memory a layer may use, such as 512M or 2G")
    parser.add_argument("--timing-cache", type=Path, help="file that makes later builds quick; made when absent")
    parser.add_argument(
        "--version-compatible", action="store_true", help="an engine that newer TensorRT 10/11 load too"
    )
    parser.add_argument("--hardware-compatible", action="store_true", help="an engine for every GPU from Ampere on")
    parser.add_argument("--layer-outputs", action="store_true", help="a second engine, for check_parity.py --layers")
    parser.add_argument("--no-kernels", action="store_true", help="build every operator from standard ones")
    parser.add_argument("--print-trtexec", action="store_true", help="print the trtexec command instead of building")
    parser.add_argument("--events", action="store_true", help="progress and result as JSON lines on stdout")
    options = parser.parse_args(arguments)
    try:
        return _run(options, module, cuda)
    except TrtError as error:
        if options.events:
            _event(error=str(error), exit_code=error.exit_code)
        else:
            print(f"error: {error}", file=sys.stderr)
        return int(error.exit_code)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        text = f"cannot read or write {error.filename or 'the engine'}: {error.strerror or error}."
        if options.events:
            _event(error=text, exit_code=5 if full else 2)
        else:
            print(f"error: {text}", file=sys.stderr)
        return 5 if full else 2
    except MemoryError:
        print("error: out of memory; stop other programs or add swap.", file=sys.stderr)
        return 5
    except KeyboardInterrupt:
        print("error: interrupted; nothing was left half-written.", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace, module: Any, cuda: Any) -> int:
    folder = Path(options.folder) if options.folder else Path(__file__).resolve().parent.parent
    manifest = read_manifest(folder)
    profiles = manifest.profiles if options.profiles == "two" else (merged(manifest.profiles),)
    workspace = None if options.workspace is None else size_in_bytes(options.workspace)
    if options.print_trtexec:
        print(trtexec_command(manifest.tensorrt, profiles, workspace))
        return 0
    backend = backend_named(options.backend)
    given = {"--hardware-compatible": options.hardware_compatible, "--timing-cache": options.timing_cache is not None}
    for option, why in backend.unsupported.items():
        if given[option]:
            raise NotSupportedError(f"{option}: {backend.label} does not support it: {why}; leave it out.")
    module = module or load_backend(backend)
    target = chosen_target(backend, module, options.sm)
    if options.timing_cache is not None and options.timing_cache.is_dir():
        raise TrtError(f"--timing-cache {options.timing_cache}: is a folder; name a file.")
    check_files(manifest)
    sm = target if target is not None else (cuda or open_cuda()).compute_capability()
    operators: tuple[str, ...] = ()
    kernels = "compiled kernels are switched off"
    if not options.no_kernels:
        operators, kernels = use_kernels(module, folder / "device" / KERNELS)
    settings = BuildSettings(
        profiles=profiles,
        target=target,
        workspace=workspace,
        timing_cache=options.timing_cache,
        version_compatible=options.version_compatible,
        hardware_compatible=options.hardware_compatible,
        layer_outputs=layer_output_names(manifest) if options.layer_outputs else (),
        kernels=operators,
    )
    with _interrupts() as stopped:
        built = build(module, manifest.graph, settings, _Reporter(options.events), stopped)
    library = str(module.__version__)
    path = write_engine(manifest, backend, library, sm, settings, built)
    _conclude(options, backend, library, sm, path, built, kernels)
    return 0


def _conclude(
    options: argparse.Namespace, backend: Backend, library: str, sm: int, path: Path, built: Any, kernels: str
) -> None:
    if options.events:
        _event(
            engine=str(path), claim=claim(backend, sm), library=library, sm=sm, bytes=int(built.plan.nbytes),
            layers=built.layers, seconds=built.seconds, log_memory=built.figures, kernels=kernels,
        )  # fmt: skip
        return
    print(
        f"{claim(backend, sm)} {library}: {path} ({built.plan.nbytes / 1e6:.1f} MB, {built.seconds:.1f} s); {kernels}"
    )


def _event(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


class _Reporter:
    """Says at most twice a second how far the build is."""

    def __init__(self, events: bool) -> None:
        self._events = events
        self._last = 0.0

    def __call__(self, phase: str, parent: str | None, done: int, steps: int) -> None:
        now = time.monotonic()
        if now - self._last < 0.5:
            return
        self._last = now
        if self._events:
            _event(phase=phase, parent=parent, done=done, steps=steps)
        elif sys.stderr.isatty():
            print(f"\r{phase} {done}/{steps}\x1b[K", end="", file=sys.stderr, flush=True)


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """A Ctrl-C must not become an exception inside TensorRT's callbacks: it sets a flag that ends the build."""
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _frame: pressed.append(number))
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


if __name__ == "__main__":
    sys.exit(main())
