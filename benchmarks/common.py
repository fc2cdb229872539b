"""What the benchmarks share: the sample model, measured subprocesses, paired ratios, JSON out."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def sample() -> Path:
    from mixt_export.sample import make_sample

    return make_sample()


def mixt(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "mixt_export.cli", *map(str, arguments)]


def int4_sample(scratch: Path) -> Path:
    """An export of the sample model below ``scratch``, int4 rounded to nearest."""
    folder = scratch / "int4"
    words = ["--quantize", "int4", "--rounding", "nearest", "--no-loss", "--no-verify"]
    subprocess.run(mixt("export", sample(), "-o", folder, *words), check=True, capture_output=True)
    return folder


@dataclass(frozen=True)
class Usage:
    """One finished process: wall seconds with the interpreter's start, CPU seconds, peak resident bytes."""

    wall: float
    cpu: float
    peak_rss: int


def measured(command: Sequence[str]) -> Usage:
    """Run ``command`` to its end; raises CalledProcessError with what it said when it fails."""
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, said)
    return Usage(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def interleaved(runs: dict[str, Callable[[], float]], rounds: int, seed: int = 0) -> dict[str, list[float]]:
    """Seconds per run, all variants in every round in random order, after one uncounted round."""
    import numpy as np

    rng = np.random.default_rng(seed)
    names = list(runs)
    for name in names:
        runs[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for index in rng.permutation(len(names)):
            seconds[names[index]].append(runs[names[index]]())
    return seconds


def paired_ratio(slow: Sequence[float], fast: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of slow/fast within each round: how many times faster ``fast`` is."""
    ratios = sorted(a / b for a, b in zip(slow, fast, strict=True))
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"median": round(middle, 3), "quartile_1": round(low, 3), "quartile_3": round(high, 3)}


def publish(name: str, result: dict[str, Any]) -> None:
    """Print ``result`` and keep it, with what it ran on."""
    text = json.dumps({"benchmark": name, **result, **machine()}, indent=1)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    print(text)


def machine() -> dict[str, Any]:
    """What a benchmark runs on: processor, cores, load; versions."""
    import onnxruntime

    found = {"cpu": _cpu(), "cores": os.cpu_count(), "load": [round(x, 1) for x in os.getloadavg()]}
    versions = {"python": platform.python_version(), "onnxruntime": onnxruntime.__version__}
    return {"machine": found, "versions": versions}


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def timer(model: Any, x: Any, repeats: int) -> float:
    """Thread CPU seconds of one run of the onnxruntime session ``model`` on its input ``x``, mean of ``repeats``."""
    return feeds_timer(model, {"x": x}, repeats)


def feeds_timer(model: Any, feeds: Mapping[str, Any], repeats: int) -> float:
    """The same for a session with other inputs, or several."""
    began = time.thread_time()
    for _ in range(repeats):
        model.run(None, feeds)
    return (time.thread_time() - began) / repeats
