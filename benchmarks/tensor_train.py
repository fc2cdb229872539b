"""Tensor trains of SmolLM2's last blocks beside low rank of equal size: perplexity, parity, speed of the exports.

python -m benchmarks.tensor_train [--blocks last:4] [--keep 0.5] [--windows 12] [--work FOLDER]

Closed forms alone, no refinement. ``--work`` keeps the folders, and uses those it finds there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, interleaved, measured, mixt, paired_ratio, publish, sample
from benchmarks.decoder import Timed

CALIBRATION = ("--windows", "32")
PLAIN = ("--refine-steps", "0", "--no-controls")
RECIPES: dict[str, tuple[str, ...]] = {
    "tt2": ("--method", "tt", "--cores", "2", *PLAIN),
    "tt3": ("--method", "tt", "--cores", "3", *PLAIN),
    "tt2o": ("--method", "tt", "--cores", "2", "--outliers", "0.001", *PLAIN),
    "svdllm": ("--method", "svd-llm"),
}
#: How exports are made to execute factors where the plan by default rebuilds matrices.
FACTORS = {
    "tt2": ("--form", "(q|k|v|o|gate|up)_proj=chain", "--form", "down_proj=chain:reversed"),
    "tt3": ("--optimize-for", "memory"),
}
TEXTS = ("addresses", "novel")
PREFILL = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", default="last:4")
    parser.add_argument("--keep", default="0.5")
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--part", choices=("all", "speed"), default="all", help="speed: keep the last run's models")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.work or Path(scratch)
        for name, recipe in RECIPES.items():
            if not (folder / name).is_dir():
                command = mixt("compress", sample(), "-o", folder / name, *recipe, *CALIBRATION)
                measured([*command, "--blocks", given.blocks, "--keep", given.keep])
        models = {"dense": sample(), **{name: folder / name for name in RECIPES}}
        exports = {name: exported(model, folder / f"{name}-out") for name, model in models.items()}
        if given.part == "speed":
            rows = json.loads((RESULTS / "tensor_train.json").read_text())["models"]
        else:
            rows = {name: row(name, models[name], out, given.windows) for name, out in exports.items()}
        factors = {
            f"{name} as factors": exported(models[name], folder / f"{name}-factors", *options)
            for name, options in FACTORS.items()
        }
        speed = timings({**exports, **factors}, given.rounds)
    publish(
        "tensor_train",
        {
            "blocks": given.blocks,
            "keep": float(given.keep),
            "windows of 512 per text": given.windows,
            "threads": 1,
            "clock": "thread CPU time",
            "models": rows,
            "speed": speed,
        },
    )


def exported(model: Path, out: Path, *options: str) -> Path:
    if not out.is_dir():
        measured(mixt("export", model, "-o", out, "--no-verify", "--max-seq-len", "2048", *options))
    return out


def row(name: str, model: Path, out: Path, windows: int) -> dict[str, Any]:
    from mixt_export.evaluation import perplexity
    from mixt_export.sample.texts import EVALUATION

    found: dict[str, Any] = {
        text: round(perplexity(out, EVALUATION[text], windows=windows, threads=1).perplexity, 2) for text in TEXTS
    }
    manifest = json.loads((out / "mixt_manifest.json").read_text())
    if name == "dense":
        return found
    report = json.loads((model / "compress_report.json").read_text())
    errors = [layer["output_error"] for layer in report["layers"]]
    subprocess.run(mixt("verify", out, "--reference", model, "--no-memory"), check=False, capture_output=True)
    proof = json.loads((out / "report.json").read_text())
    return {
        **found,
        "kept": round(report["keep_achieved"], 4),
        "median output error": round(statistics.median(errors), 4),
        "compress seconds": report["seconds"],
        "verify passed": proof["passed"],
        "weights in graph": manifest["plan"]["elements"],
        "forms": sorted({form["form"] for form in manifest["plan"]["forms"].values()}),
        "second forms": sum("many" in form for form in manifest["plan"]["forms"].values()),
    }


def timings(exports: dict[str, Path], rounds: int) -> dict[str, Any]:
    kv = json.loads((exports["dense"] / "mixt_manifest.json").read_text())["kv"]
    models = {name: Timed(out, kv["heads"], kv["head_dim"], 512) for name, out in exports.items()}
    found: dict[str, Any] = {}
    regimes: dict[str, Callable[[Timed], float]] = {
        "decode at 128": lambda model: model.decode(128),
        f"prefill {PREFILL}": lambda model: model.prefill(PREFILL),
    }
    for regime, run in regimes.items():
        seconds = interleaved({name: partial(run, model) for name, model in models.items()}, rounds)
        found[regime] = {
            name: {
                "ms": round(1e3 * statistics.median(taken), 2),
                "times dense": paired_ratio(seconds["dense"], taken)["median"],
            }
            for name, taken in seconds.items()
        }
    return found


if __name__ == "__main__":
    main()
