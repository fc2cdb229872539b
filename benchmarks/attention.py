"""ONNX Runtime's two ways to attend on a CPU, tiled ("flash") and with whole rows of scores: prefill in the runner.

python -m benchmarks.attention [FOLDER] [--rounds 5]

The folder is a dense float32 export of SmolLM2 unless one is named. Both models are loaded in one process, one thread,
calls interleaved, thread CPU time; ratios are medians within a round. ``same``: largest relative difference of logits.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import interleaved, mixt, paired_ratio, publish, sample
from mixt_export.runtime import load_runtime

SWITCH = "ORT_GQA_DISABLE_FLASH_ATTENTION"
LENGTHS, CHUNKS = (64, 256, 1024), (128, 256, 512)


def model(folder: Path, tiled: bool) -> Any:
    os.environ[SWITCH] = "0" if tiled else "1"
    return load_runtime().Model(folder, threads=1)


def timed(run: Any, ids: list[int], chunk: int) -> float:
    cache = run.new_cache()
    began = time.thread_time()
    run.prefill([ids], cache, chunk=chunk)
    return time.thread_time() - began


def measured(folder: Path, rounds: int) -> dict[str, Any]:
    models = {"tiled": model(folder, True), "whole": model(folder, False)}
    rng = np.random.default_rng(0)
    rows = []
    for length in LENGTHS:
        ids = [int(token) for token in rng.integers(1000, 40000, length)]
        logits = [run.prefill([ids], run.new_cache(), chunk=256) for run in models.values()]
        for chunk in CHUNKS:
            if chunk > length and chunk != CHUNKS[0]:
                continue
            calls = {name: (lambda m=run, i=ids, c=chunk: timed(m, i, c)) for name, run in models.items()}
            seconds = interleaved(calls, rounds)
            rows.append({
                "tokens": length,
                "chunk": chunk,
                "whole tokens/s": round(length / float(np.median(seconds["whole"])), 1),
                "whole times tiled": paired_ratio(seconds["tiled"], seconds["whole"]),
                "same": float(np.linalg.norm(logits[0] - logits[1]) / np.linalg.norm(logits[0])),
            })  # fmt: skip
            print(rows[-1], flush=True)
    return {"threads": 1, "rounds": rounds, "clock": "thread CPU time", "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder
        if folder is None:
            folder = Path(scratch) / "dense"
            subprocess.run(mixt("export", sample(), "-o", folder, "--no-verify"), check=True, capture_output=True)
        publish("attention", measured(folder, options.rounds))


if __name__ == "__main__":
    main()
