"""What training after compression brings: MixT in the last blocks of SmolLM2, and low rank of the same size beside it.

python -m benchmarks.recovery [--n-tensors 4 2] [--blocks last:4] [--steps 120] [--windows 16] [--no-control]

Trained on the shipped calibration texts alone, one thread. CPU seconds are those of the whole processes.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import measured, mixt, publish, sample

#: Evaluation texts and what they are to the training texts.
TEXTS = {"addresses": "in domain", "novel": "out of domain"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n-tensors", type=int, nargs="+", default=[4, 2])
    parser.add_argument("--blocks", default="last:4")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--refine-steps", type=int, default=0)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--no-control", action="store_true")
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    rows: dict[str, Any] = {"dense": score(sample(), given.windows, None)}
    recipes = {
        f"mixt N_T {terms}": [
            *("--method", "mixt", "--n-tensors", str(terms)),
            *("--refine-steps", str(given.refine_steps), "--no-controls"),
        ]
        for terms in given.n_tensors
    }
    if not given.no_control:
        recipes |= {
            f"svd-llm, size of N_T {terms}": ["--method", "svd-llm", "--keep", str(terms / 4 ** (terms - 1))]
            for terms in given.n_tensors
        }
    about = {"blocks": given.blocks, "windows of 512 per text": given.windows, "texts": TEXTS}
    for name, recipe in recipes.items():
        training = ["--steps", str(given.steps)]
        rows[name] = row([*recipe, "--blocks", given.blocks], training, given.windows, rows["dense"])
        publish("recovery", {**about, "rows": rows})  # after every row: an interrupted run keeps what it has


def row(recipe: list[str], training: list[str], windows: int, dense: dict[str, float]) -> dict[str, Any]:
    """Compress by ``recipe``, recover by ``training``, score both."""
    with tempfile.TemporaryDirectory() as scratch:
        student, recovered = Path(scratch) / "student", Path(scratch) / "recovered"
        compress = measured(mixt("compress", sample(), "-o", student, *recipe))
        recover = measured(mixt("recover", student, "--teacher", sample(), "-o", recovered, *training))
        report = json.loads((recovered / "recover_report.json").read_text())
        return {
            "compressed": score(student, windows, dense),
            "recovered": score(recovered, windows, dense),
            "kept": json.loads((student / "compress_report.json").read_text())["keep_achieved"],
            "commands": [" ".join(["mixt compress", *recipe]), " ".join(["mixt recover", *training])],
            "steps": report["steps"],
            "best step": report["best_step"],
            "tokens trained on": report["tokens"],
            "CPU seconds": {"compress": round(compress.cpu, 1), "recover": round(recover.cpu, 1)},
            "recover stages": report["cpu_seconds"],
            "recover peak RSS MB": round(recover.peak_rss / 1e6),
        }


def score(folder: Path, windows: int, dense: dict[str, float] | None) -> dict[str, float]:
    """Perplexity in PyTorch float32 by text, and times that of the dense model."""
    from mixt_export.evaluation import open_scorer, perplexity
    from mixt_export.sample.texts import EVALUATION

    scorer = open_scorer(folder, 1)
    found = {name: perplexity(scorer, EVALUATION[name], windows=windows).perplexity for name in TEXTS}
    times = {} if dense is None else {f"{name}, times dense": round(found[name] / dense[name], 3) for name in found}
    return {name: round(value, 2) for name, value in found.items()} | times


if __name__ == "__main__":
    main()
