"""How threads of the runner wait for work: asleep, busily for microseconds (the default), or as long as ONNX Runtime.

python -m benchmarks.threads [FOLDER] [--rounds 8]

The folder is an int4 export of SmolLM2 rounded to nearest unless one is named. All are loaded in one process, slices
of a prompt and tokens after it in turn, wall time; once on the machine as it is, once beside a process that keeps one
core busy. "alone": one thread. Ratios are medians within a round: how many times as fast as with sleep alone.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import int4_sample, paired_ratio, publish
from mixt_export.runtime import load_runtime

PROMPT, NEW = 256, 32
_BUSY = "while True: pass"


def models(folder: Path, threads: int) -> dict[str, Any]:
    """The same folder with one thread, and with ``threads`` that wait in three ways."""
    runtime = load_runtime()
    found = {"alone": runtime.Model(folder, threads=1), "microseconds": runtime.Model(folder, threads=threads)}
    found["as onnxruntime"] = runtime.Model(folder, threads=threads, spinning=True)
    limit, runtime._SPIN_LIMITED = runtime._SPIN_LIMITED, (sys.maxsize,)  # no version has the limit: threads sleep
    try:
        found["asleep"] = runtime.Model(folder, threads=threads)
    finally:
        runtime._SPIN_LIMITED = limit
    return found


def measured(loaded: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Tokens per second of each and how many times as fast as "asleep" that is, after one uncounted round."""
    rng = np.random.default_rng(0)
    ids = [int(token) for token in rng.integers(1000, 40000, PROMPT)]
    seconds: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in loaded}
    names = list(loaded)
    for round_ in range(rounds + 1):
        for index in rng.permutation(len(names)):
            generation = loaded[names[index]].generate(ids, NEW, stop=())
            list(generation)
            if round_:
                seconds[names[index]]["prefill"].append(generation.stats.prefill_s)
                seconds[names[index]]["decode"].append(generation.stats.decode_s / generation.stats.decode_steps)
    return {
        name: {
            part: {
                "tokens/s": round((PROMPT if part == "prefill" else 1) / statistics.median(spent), 1),
                "times asleep": paired_ratio(seconds["asleep"][part], spent),
            }
            for part, spent in parts.items()
        }
        for name, parts in seconds.items()
    }


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """While open, so many other processes each keep a core busy."""
    running = [subprocess.Popen([sys.executable, "-c", _BUSY]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    threads = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or int4_sample(Path(scratch))
        loaded = models(folder, threads)
        result = {}
        for processes in (0, 1):
            with busy(processes):
                result[f"beside {processes} busy processes"] = measured(loaded, options.rounds)
    publish("threads", {"threads": threads, "rounds": options.rounds, "clock": "wall time", **result})


if __name__ == "__main__":
    main()
