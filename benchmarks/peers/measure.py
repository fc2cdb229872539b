"""What is measured of a contender: files, quality, memory in a fresh process, speed in turns with the others."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import measured, paired_ratio
from benchmarks.peers.client import Worker, WorkerError, working
from benchmarks.peers.contenders import Contender

#: Tokens of the prompt and tokens after it in every timed slice.
PROMPT, NEW = 256, 32
#: Tokens of a window of the perplexity.
WINDOW = 512


def make(contender: Contender) -> dict[str, Any]:
    """Make its files anew; seconds and peak memory of all commands together (None where there are none), bytes."""
    spent = [measured(command) for command in contender.commands]
    folder, single = contender.path, contender.path.is_file()
    files = [folder] if single else sorted(path for path in folder.glob(contender.files) if path.is_file())
    size = round(sum(path.stat().st_size for path in files) / 1e6, 1)
    if not spent:
        return {"export": None, "file_mb": size}
    cost = {
        "wall_s": round(sum(usage.wall for usage in spent), 2),
        "cpu_s": round(sum(usage.cpu for usage in spent), 2),
        "peak_rss_mb": round(max(usage.peak_rss for usage in spent) / 1e6),
    }
    return {"export": cost, "file_mb": size}


def quality(python: Path, contender: Contender, texts: dict[str, Sequence[Sequence[int]]]) -> dict[str, float]:
    """Perplexity per text over windows of token ids, each predicted by the engine's own logits."""
    found = {}
    with working(python, contender, 1) as worker:
        for name, windows in texts.items():
            nll = sum(worker("score", windows=[list(window) for window in windows])["nll"])
            found[name] = round(math.exp(nll / sum(len(window) - 1 for window in windows)), 2)
    return found


def memory(python: Path, contender: Contender, prompt: Sequence[int], threads: int, loads: int = 3) -> dict[str, Any]:
    """Load times of ``loads`` fresh processes (their median), peak memory of one that also generates."""
    seconds = []
    for index in range(loads):
        with working(python, contender, threads) as worker:
            seconds.append(worker.loaded["load"]["cpu"])
            if index == 0:
                tokens = worker("slice", ids=list(prompt), count=NEW)["tokens"]
                after = worker("memory")
                before = worker.loaded["before"]["rss"]
    return {
        "load_cpu_s": round(statistics.median(seconds), 3),
        "peak_rss_mb": round(after["peak"] / 1e6, 1),
        "rss_before_load_mb": round(before / 1e6, 1),
        "anonymous_mb": round(after["anonymous"] / 1e6, 1),
        "tokens": tokens,
    }


def speed(
    python: Path, chosen: Sequence[Contender], prompt: Sequence[int], threads: int, rounds: int, seed: int = 0
) -> dict[str, Any]:
    """All loaded at once, slices in turn, in random order within a round; the first round does not count.

    With one thread the clock is the process's CPU time, with more it is wall time; both are kept.
    """
    workers = {contender.name: Worker(python, contender, threads) for contender in chosen}
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    try:
        rng = np.random.default_rng(seed)
        names = list(workers)
        for round_ in range(rounds + 1):
            for index in rng.permutation(len(names)):
                answer = workers[names[index]]("slice", ids=list(prompt), count=NEW)
                if round_:
                    samples[names[index]].append(answer)
    finally:
        for worker in workers.values():
            worker.close()
    clock = "cpu" if threads == 1 else "wall"
    return {"threads": threads, "rounds": rounds, "clock": clock, "engines": _rates(samples, clock)}


def _rates(samples: dict[str, list[dict[str, Any]]], clock: str) -> dict[str, Any]:
    found = {}
    for name, slices in samples.items():
        row: dict[str, Any] = {"busy": round(_busy(slices), 2)}
        for part, tokens in (("prefill", PROMPT), ("decode", NEW)):
            seconds = [one[part][clock] for one in slices]
            row[part] = {
                "tokens_per_s": round(tokens / statistics.median(seconds), 1),
                "seconds": [round(s, 5) for s in seconds],
            }
        found[name] = row
    return found


def _busy(slices: list[dict[str, Any]]) -> float:
    """CPU seconds over wall seconds: how much of its threads an engine got and used."""
    cpu = sum(one[part]["cpu"] for one in slices for part in ("prefill", "decode"))
    return cpu / max(sum(one[part]["wall"] for one in slices for part in ("prefill", "decode")), 1e-9)


def against(speeds: dict[str, Any], base: str) -> dict[str, Any]:
    """Per engine and part how many times faster than ``base``: median and quartiles of the ratio within a round."""
    engines = speeds["engines"]
    if base not in engines:
        return {}
    return {
        name: {
            part: paired_ratio(engines[base][part]["seconds"], row[part]["seconds"]) for part in ("prefill", "decode")
        }
        for name, row in engines.items()
        if name != base
    }


__all__ = ["NEW", "PROMPT", "WINDOW", "WorkerError", "against", "make", "memory", "quality", "speed"]
