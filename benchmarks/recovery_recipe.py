"""The default recipe with recovery on SmolLM2: quality, seconds and memory of `mixt compress --keep K --recover`.

python -m benchmarks.recovery_recipe [--keep 0.6 0.8 0.9] [--work DIR] [--windows 16] [--steps N] [--seed S]

Trained on the shipped calibration texts alone. Models stay in DIR: a row that is there is not made again, and a recipe
that was interrupted goes on; CPU and wall seconds add up over its processes. The first row measures the calibration
statistics, the others find them in DIR (``statistics from a cache`` says which).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, mixt, publish, sample

#: Evaluation texts, what they are to the training texts, and the hoped-for ratios to dense by share kept.
TEXTS = {"addresses": "in domain", "novel": "out of domain"}
AIMS = {0.9: (1.05, 1.10), 0.8: (1.20, 1.40), 0.6: (1.7, 2.5)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.6, 0.8, 0.9])
    parser.add_argument("--work", type=Path, default=Path("recipe-models"))
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    given.work.mkdir(parents=True, exist_ok=True)
    for keep in given.keep:
        other = {"recover-steps": given.steps, "seed": given.seed or None}
        other = {option: value for option, value in other.items() if value is not None}
        options = [str(part) for option, value in other.items() for part in (f"--{option}", value)]
        name = ", ".join([f"{keep:g}", *(f"{option} {value}" for option, value in other.items())])
        folder = given.work / f"keep-{name.replace(', ', '-').replace(' ', '-')}"
        cache = ["--cache", given.work / "statistics"]
        command = ["compress", sample(), "-o", folder, "--keep", f"{keep:g}", "--recover", *options]
        usage = given.work / f"{folder.name}.json"
        if not folder.exists():
            run(mixt(*command, *cache, "--resume"), usage)
        found = row(folder, keep, json.loads(usage.read_text())) | {
            "score": score(folder, given.windows),
            "command": " ".join(["mixt compress MODEL -o OUT", *map(str, command[4:])]),
        }
        rows = _earlier() | {name: found}
        about = {"windows of 512 per text": given.windows, "texts": TEXTS, "aims": AIMS}
        publish("recovery_recipe", {**about, "rows": rows})  # after every row: an interrupted run keeps what it has


def run(command: list[str], usage: Path) -> None:
    """Run ``command``, or be interrupted; add what it used to the file ``usage``."""
    began = time.perf_counter()
    process = subprocess.Popen(command)
    try:
        _, status, used = os.wait4(process.pid, 0)
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    before = json.loads(usage.read_text()) if usage.exists() else {"CPU": 0.0, "wall": 0.0, "peak RSS MB": 0.0}
    after = {
        "CPU": before["CPU"] + used.ru_utime + used.ru_stime,
        "wall": before["wall"] + time.perf_counter() - began,
        "peak RSS MB": max(before["peak RSS MB"], used.ru_maxrss * 1024 / 1e6),
    }
    usage.write_text(json.dumps(after))
    if process.returncode:
        raise SystemExit(process.returncode)


def row(folder: Path, keep: float, usage: dict[str, float]) -> dict[str, Any]:
    """What the two reports in ``folder`` say, with the whole process's ``usage``."""
    recovered, compressed = (
        json.loads((folder / name).read_text()) for name in ("recover_report.json", "compress_report.json")
    )
    return {
        "asked": keep,
        "kept": compressed["keep_achieved"],
        "steps": recovered["steps"],
        "best step": recovered["best_step"],
        "rate": recovered["settings"]["matrix_rate"],
        "tokens trained on": recovered["tokens"],
        "held-out KL at the checks": [round(check["held_out_kl"], 4) for check in recovered["checks"]],
        "seconds and memory of the whole recipe": {name: round(value, 1) for name, value in usage.items()},
        "statistics from a cache": bool(compressed["cached"]),
        "wall seconds of compress": compressed["seconds"],
        "CPU seconds of recover": recovered["cpu_seconds"],
    }


def score(folder: Path, windows: int) -> dict[str, Any]:
    """Perplexity, that of the dense model, their ratio, and KL(dense ‖ this) in nats, PyTorch float32."""
    from mixt_export.evaluation import open_scorer, perplexity
    from mixt_export.sample.texts import EVALUATION

    ours, dense = open_scorer(folder, 1), open_scorer(sample(), 1)
    found = {}
    for name in TEXTS:
        result = perplexity(ours, EVALUATION[name], windows=windows, reference=dense)
        assert result.other_perplexity is not None
        assert result.kl is not None
        found[name] = {
            "dense": round(result.other_perplexity, 2),
            "recovered": round(result.perplexity, 2),
            "times dense": round(result.perplexity / result.other_perplexity, 3),
            "KL": round(result.kl, 4),
        }
    return found


def _earlier() -> dict[str, Any]:
    """Rows that an earlier run published."""
    file = RESULTS / "recovery_recipe.json"
    return dict(json.loads(file.read_text())["rows"]) if file.is_file() else {}


if __name__ == "__main__":
    main()
