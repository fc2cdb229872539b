"""One builder for TensorRT 10.3 to 11.x and TensorRT-RTX: the module comes in as an argument.

Everything a version may lack is asked for before it is used; what one of them calls differently is decided here.
Precision is in the graph (strongly typed); no builder flag changes a result.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import NotSupportedError, OutOfMemoryError, TrtError
from .log import Log, make_logger
from .manifest import Profile
from .monitor import Report, make_monitor
from .parsing import check_traps, mark_layer_outputs, parse

_OUT_OF_MEMORY = re.compile(
    r"(?i)out ?of ?memory|Error Code 2:|insufficient memory|bad_alloc|cannot allocate|cudaErrorMemory"
)
_NO_TACTIC = re.compile(
    r"(?i)insufficient workspace|could not find any implementation|within workspace limit|increas\w+ the workspace"
)
_HARDWARE = re.compile(r"(?i)HW-specific datatypes|compute capability is invalid|Cannot compile for target")


@dataclass(frozen=True)
class BuildSettings:
    """How to build. ``target``: compute capability such as 86 (TensorRT-RTX), None for this machine's GPU.

    ``workspace``: bytes, None for the library's default. ``timing_cache``: file that is read and extended; libraries
    without timing caches leave it alone. ``layer_outputs``: tensors that become outputs besides those of the graph.
    ``kernels``: operators that compiled kernels execute; their plugins are registered already.
    """

    profiles: tuple[Profile, ...]
    target: int | None = None
    workspace: int | None = None
    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    layer_outputs: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Built:
    """A serialised engine (``plan``: bytes-like), and what is known about it without loading it."""

    plan: Any
    layers: int
    figures: dict[str, Any]
    warnings: list[str]
    seconds: float


def build(
    module: Any,
    graph: Path,
    settings: BuildSettings,
    report: Report = lambda *_: None,
    stopped: Callable[[], bool] = lambda: False,
) -> Built:
    """Parse ``graph`` and build an engine with ``module`` (``tensorrt`` or ``tensorrt_rtx``).

    Raises NotSupportedError (graph, types, target), OutOfMemoryError, TrtError, KeyboardInterrupt when ``stopped``.
    """
    began = time.monotonic()
    log = Log()
    logger = make_logger(module, log)
    builder = module.Builder(logger)
    network = builder.create_network(_creation_flags(module))
    config = builder.create_builder_config()
    parser = parse(module, network, logger, log, graph)
    if settings.layer_outputs:
        mark_layer_outputs(network, list(settings.layer_outputs))
    _configure(module, config, settings)
    for profile in settings.profiles:
        _add_profile(builder, network, config, profile)
    monitor = make_monitor(module, report, stopped)
    if hasattr(config, "progress_monitor"):
        config.progress_monitor = monitor
    cache = _load_timing_cache(config, settings.timing_cache)
    plan = builder.build_serialized_network(network, config)
    if monitor.failure is not None:
        raise monitor.failure
    if plan is None:
        if stopped():
            raise KeyboardInterrupt
        raise _failure(log, graph, settings)
    check_traps(log, graph)
    _save_timing_cache(cache, settings.timing_cache)
    del parser
    return Built(plan, network.num_layers, log.figures(), log.warnings, time.monotonic() - began)


def _creation_flags(module: Any) -> int:
    """Strong typing: a flag of 10.x and RTX; where it is gone, networks are always strongly typed."""
    flag = getattr(module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _configure(module: Any, config: Any, settings: BuildSettings) -> None:
    # TF32 would round float32 products to 10 bits of mantissa: not what the graph says.
    if hasattr(module.BuilderFlag, "TF32"):
        config.clear_flag(module.BuilderFlag.TF32)
    if settings.workspace is not None:
        config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, settings.workspace)
    if settings.target is not None:
        config.num_compute_capabilities = 1
        if not config.set_compute_capability(getattr(module.ComputeCapability, f"SM{settings.target}"), 0):
            raise NotSupportedError(f"SM{settings.target} cannot be built here; build on the device.")
    if settings.version_compatible:
        config.set_flag(_member(module.BuilderFlag, "VERSION_COMPATIBLE", "--version-compatible"))
    if settings.hardware_compatible:
        level = _member(module.HardwareCompatibilityLevel, "AMPERE_PLUS", "--hardware-compatible")
        config.hardware_compatibility_level = level


def _member(enumeration: Any, name: str, option: str) -> Any:
    value = getattr(enumeration, name, None)
    if value is None:
        raise NotSupportedError(f"{option}: this version of TensorRT has no {name}; leave the option out.")
    return value


def _add_profile(builder: Any, network: Any, config: Any, profile: Profile) -> None:
    inputs = {network.get_input(index).name for index in range(network.num_inputs)}
    odd = sorted(inputs ^ set(profile.inputs))
    if odd:
        side = "the graph has no such input" if odd[0] in profile.inputs else "the profile does not name it"
        raise TrtError(f"profile {profile.name!r} does not fit the graph: {odd[0]}: {side}; export the model again.")
    added = builder.create_optimization_profile()
    for name, (low, tuned, high) in profile.inputs.items():
        added.set_shape(name, low, tuned, high)
    if config.add_optimization_profile(added) < 0:
        raise TrtError(f"profile {profile.name!r} is refused by TensorRT; export the model again with other limits.")


def _load_timing_cache(config: Any, path: Path | None) -> Any:
    """Attach a timing cache, from ``path`` where it exists; None where none is wanted or the library keeps none."""
    if path is None:
        return None
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if cache is None:
        return None
    if not config.set_timing_cache(cache, False):
        # Made by another TensorRT or for another GPU: start anew rather than fail.
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def _save_timing_cache(cache: Any, path: Path | None) -> None:
    if cache is None or path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.tmp")
    fresh.write_bytes(bytes(cache.serialize()))
    fresh.replace(path)


def _failure(log: Log, graph: Path, settings: BuildSettings) -> TrtError:
    said = " | ".join(" ".join(text.split()) for text in log.errors[-3:]) or "TensorRT does not say why"
    text = " ".join(log.errors)
    if _OUT_OF_MEMORY.search(text):
        return OutOfMemoryError(
            f"{graph}: out of memory while building ({said}); stop other programs, add swap, or export with a smaller "
            "--max-seq-len, --max-input-len or --max-batch."
        )
    if _NO_TACTIC.search(text) and settings.workspace is not None:
        return OutOfMemoryError(
            f"{graph}: the workspace of {settings.workspace} bytes is too small for a layer ({said}); "
            "raise --workspace."
        )
    if _HARDWARE.search(text):
        return NotSupportedError(f"{graph}: the target's hardware lacks something the graph uses ({said}).")
    return NotSupportedError(f"{graph}: TensorRT cannot build an engine from it ({said}).")
