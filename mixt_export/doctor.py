"""Facts about this machine that explain what works here: packages, processor, memory, disk."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mixt_export.resources import resource


@dataclass(frozen=True)
class Requirement:
    """One package: distribution name, import name, and the extra it belongs to ("" for core)."""

    distribution: str
    module: str
    extra: str = ""


#: What pyproject.toml declares, without the extra for developers.
REQUIREMENTS = (
    Requirement("numpy", "numpy"),
    Requirement("ml-dtypes", "ml_dtypes"),
    Requirement("safetensors", "safetensors"),
    Requirement("onnx", "onnx"),
    Requirement("onnx-ir", "onnx_ir"),
    Requirement("onnxruntime", "onnxruntime"),
    Requirement("tokenizers", "tokenizers"),
    Requirement("opt-einsum", "opt_einsum"),
    Requirement("typer", "typer"),
    Requirement("rich", "rich"),
    Requirement("jinja2", "jinja2"),
    Requirement("torch", "torch", "torch"),
    Requirement("transformers", "transformers", "torch"),
    Requirement("gguf", "gguf", "sample"),
    Requirement("onnxruntime-genai", "onnxruntime_genai", "genai"),
    Requirement("matplotlib", "matplotlib", "report"),
    Requirement("tensorrt-rtx-cu13", "tensorrt_rtx", "rtx"),
    Requirement("tensorrt", "tensorrt", "trt"),
    Requirement("triton", "triton", "kernels"),
)

#: Processor features that decide how fast ONNX Runtime's kernels are (x86 and ARM names of /proc/cpuinfo).
_FEATURES = (
    *("avx", "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_int8", "amx_bf16", "asimd", "fphp", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2"),
)


@dataclass(frozen=True)
class Package:
    """A package as found; ``version`` is None when it is missing, ``install`` the command that helps then."""

    name: str
    extra: str
    version: str | None
    install: str | None


@dataclass(frozen=True)
class Findings:
    """What `mixt doctor` reports. Sizes in bytes; None where the system does not say."""

    mixt_export: str
    python: str
    system: str
    cpu: str
    cpu_features: tuple[str, ...]
    physical_cores: int | None
    logical_cores: int
    memory_total: int | None
    memory_available: int | None
    disks: dict[str, int]
    hardlinks: bool
    packages: tuple[Package, ...]
    onnxruntime_providers: tuple[str, ...]
    sample_folder: str | None
    sample_complete: bool
    resources: dict[str, bool]

    @property
    def missing_core(self) -> tuple[str, ...]:
        """Names of the packages without which nothing works."""
        return tuple(package.name for package in self.packages if not package.extra and package.version is None)

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready data."""
        return {**asdict(self), "missing_core": list(self.missing_core)}


def examine(folder: Path) -> Findings:
    """Look at this machine; ``folder`` is where output would go (links and disk space are tried there)."""
    total, available = _memory()
    sample_folder, sample_complete = _sample()
    places = [folder.absolute(), *([sample_folder.parent] if sample_folder else [])]
    return Findings(
        mixt_export=_own_version(),
        python=f"{platform.python_implementation()} {platform.python_version()}",
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu=_cpu_name(),
        cpu_features=cpu_features(),
        physical_cores=_physical_cores(),
        logical_cores=os.cpu_count() or 1,
        memory_total=total,
        memory_available=available,
        disks={str(place): shutil.disk_usage(_existing(place)).free for place in places},
        hardlinks=hardlinks_work(folder),
        packages=tuple(_package(requirement) for requirement in REQUIREMENTS),
        onnxruntime_providers=_providers(),
        sample_folder=str(sample_folder) if sample_folder else None,
        sample_complete=sample_complete,
        resources={kind: resource(kind).is_dir() for kind in ("graphs", "runtimes")},
    )


def hardlinks_work(folder: Path) -> bool:
    """Whether a file in ``folder`` can be linked there (exports then share the weights of the model folder)."""
    try:
        with tempfile.TemporaryDirectory(prefix=".mixt-doctor-", dir=folder) as scratch:
            source, target = Path(scratch) / "a", Path(scratch) / "b"
            source.write_bytes(b"x")
            os.link(source, target)
            return source.stat().st_nlink == 2
    except OSError:
        return False


def _package(requirement: Requirement) -> Package:
    wanted = f"mixt-export[{requirement.extra}]" if requirement.extra else requirement.distribution
    version = _version(requirement)
    return Package(requirement.distribution, requirement.extra, version, None if version else f"pip install '{wanted}'")


def _version(requirement: Requirement) -> str | None:
    """Version of an importable package; another distribution may provide the module (onnxruntime-gpu)."""
    if importlib.util.find_spec(requirement.module) is None:
        return None
    try:
        return importlib.metadata.version(requirement.distribution)
    except importlib.metadata.PackageNotFoundError:
        providers = importlib.metadata.packages_distributions().get(requirement.module, [])
        return f"{importlib.metadata.version(providers[0])} ({providers[0]})" if providers else "unknown"


def _own_version() -> str:
    from mixt_export import __version__

    return __version__


def _providers() -> tuple[str, ...]:
    if importlib.util.find_spec("onnxruntime") is None:
        return ()
    import onnxruntime

    return tuple(onnxruntime.get_available_providers())


def _physical_cores() -> int | None:
    """As the runtime counts them: its default number of threads."""
    if importlib.util.find_spec("onnxruntime") is None or importlib.util.find_spec("numpy") is None:
        return None
    from mixt_export.runtime import load_runtime

    return int(load_runtime("ort").physical_cores())


def _sample() -> tuple[Path | None, bool]:
    """Where the sample model is kept and whether it is there; (None, False) when a core package is missing."""
    try:
        from mixt_export.sample import default_output, is_complete
    except ModuleNotFoundError:
        return None, False
    folder = default_output()
    return folder, is_complete(folder)


def _memory() -> tuple[int | None, int | None]:
    """Total and available memory; a Linux cgroup's limit counts as total when it is smaller."""
    text = _read(Path("/proc/meminfo"))
    sizes = {name: int(size) * 1024 for name, size in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}
    total, available = sizes.get("MemTotal"), sizes.get("MemAvailable")
    if total is None:
        try:
            total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (AttributeError, ValueError, OSError):
            return None, None
    limit = _read(Path("/sys/fs/cgroup/memory.max")).strip()
    if limit.isdigit() and int(limit) < total:
        total = int(limit)
        used = _read(Path("/sys/fs/cgroup/memory.current")).strip()
        if used.isdigit():
            room = max(0, total - int(used))
            available = room if available is None else min(available, room)
    return total, available


def _cpu_name() -> str:
    found = re.search(r"^(?:model name|Hardware|Model)\s*:\s*(.+)$", _read(Path("/proc/cpuinfo")), re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def cpu_features() -> tuple[str, ...]:
    """Which of the features that matter here this processor has, by the names of /proc/cpuinfo; empty without it."""
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _read(Path("/proc/cpuinfo")), re.MULTILINE)
    present = set(found.group(1).split()) if found else set()
    return tuple(name for name in _FEATURES if name in present)


def _read(path: Path) -> str:
    """Text of a small system file, empty where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _existing(folder: Path) -> Path:
    """``folder`` or its nearest parent that exists."""
    while not folder.exists():
        folder = folder.parent
    return folder
