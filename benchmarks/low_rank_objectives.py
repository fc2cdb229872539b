"""The four objectives of AA-SVD with and without block refinement: uniform ranks, all linears of SmolLM2.

python -m benchmarks.low_rank_objectives [--keep 0.8] [--calibration 64] [--windows 8] [--refine-steps 16]
    [--blocks all] [--only input-aware anchored] [--no-refined]

One thread, one row after the other; a row that the last run with equal arguments has finished is not run again, so an
interrupted run goes on. Perplexity in PyTorch float32.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, publish, sample
from mixt_export.compression.method import OBJECTIVES

NAME = "low_rank_objectives"

#: Evaluation texts and what they are to the calibration texts.
TEXTS = {"addresses": "in domain", "novel": "out of domain"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--calibration", type=int, default=64, help="windows of 256 tokens")
    parser.add_argument("--windows", type=int, default=8, help="windows of 512 tokens of each evaluation text")
    parser.add_argument("--refine-steps", type=int, default=16)
    parser.add_argument("--blocks", default="all")
    parser.add_argument("--only", nargs="+", choices=list(OBJECTIVES), default=list(OBJECTIVES))
    parser.add_argument("--no-refined", action="store_true")
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    about = {
        "method": "aa-svd, uniform ranks",
        "keep": given.keep,
        "blocks": given.blocks,
        "calibration windows of 256": given.calibration,
        "evaluation windows of 512 per text": given.windows,
        "steps of refinement per block": given.refine_steps,
        "texts": TEXTS,
    }
    rows: dict[str, Any] = before(about)
    if "dense" not in rows:
        rows["dense"] = {"perplexity": score(sample(), given.windows)}
        publish(NAME, {**about, "rows": rows})
    for objective in given.only:
        for steps in (0,) if given.no_refined else (0, given.refine_steps):
            name = f"{objective}, refined" if steps else objective
            if name not in rows:
                rows[name] = row(objective, steps, given, rows["dense"]["perplexity"])
                publish(NAME, {**about, "rows": rows})


def before(about: dict[str, Any]) -> dict[str, Any]:
    """Rows of the last run, where it had the same arguments."""
    path = RESULTS / f"{NAME}.json"
    if not path.is_file():
        return {}
    last = json.loads(path.read_text(encoding="utf-8"))
    rows: dict[str, Any] = last["rows"] if all(last.get(key) == value for key, value in about.items()) else {}
    return rows


def row(objective: str, steps: int, given: argparse.Namespace, dense: dict[str, float]) -> dict[str, Any]:
    """Compress, then score."""
    from mixt_export.compression import Settings, compress

    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        report = compress(
            sample(),
            Path(folder) / "model",
            method="aa-svd",
            objective=objective,
            ranks="uniform",
            keep=given.keep,
            blocks=given.blocks,
            refine_steps=steps,
            settings=Settings(windows=given.calibration),
            evaluate=False,
        )
        seconds = time.process_time() - began
        found = score(Path(folder) / "model", given.windows)
    return {
        "perplexity": found,
        "times dense": {text: round(value / dense[text], 3) for text, value in found.items()},
        "kept": round(report.keep_achieved, 4),
        "CPU seconds": round(seconds, 1),
        "block losses": [[round(block.loss_before, 5), round(block.loss_after, 5)] for block in report.blocks],
    }


def score(model: Path, windows: int) -> dict[str, float]:
    """Perplexity of the model folder on each text."""
    from mixt_export.evaluation import open_scorer, perplexity
    from mixt_export.sample.texts import EVALUATION

    scorer = open_scorer(model, 1)
    return {text: round(perplexity(scorer, EVALUATION[text], windows=windows).perplexity, 2) for text in TEXTS}


if __name__ == "__main__":
    main()
