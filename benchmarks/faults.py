"""Faults put into exported models, clean exports, and how small a fault may be: what `mixt verify` catches.

python -m benchmarks.faults                         everything; prints the table; takes an hour on two cores
python -m benchmarks.faults --parts kinds --models small    a part of it; the results of the others are kept
python -m benchmarks.faults --print                 the table of the last run

Default thresholds throughout. CPU seconds are those of the process that verifies.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import RESULTS, machine, mixt, sample

FILE = RESULTS / "faults.json"
#: Small models that get every kind of fault they have a place for; each kind has a small model of its own besides.
OTHERS = ("low-rank ort", "mixt onnx", "gemma2 ort fp16", "gpt2 onnx fp16")
#: SmolLM2: the first blocks of it, with vocabulary and sizes of the real one.
BLOCKS = 3
REAL = ("smollm2 ort fp32", "smollm2 ort fp16", "smollm2-svd ort fp32")
GROUPS = ["small", "others", "real"]
_KEEP = tuple({"keep": rate} for rate in (0.7, 0.85, 0.95))
#: Method -> options to try in turn on a small model.
METHODS: dict[str, tuple[dict[str, Any], ...]] = {
    "svd": _KEEP,
    "gfw-svd": _KEEP,
    "aa-svd": _KEEP,
    "tucker": ({},),
    "mixt": ({"n_tensors": 3, "refine_steps": 0, "controls": False},),
    "tt": ({"keep": 0.7, "refine_steps": 0, "controls": False},),
    "laser": ({},),
}
SEEDS = (0, 1, 2)
WAYS = (("ort", "fp32"), ("ort", "fp16"), ("onnx", "fp32"), ("onnx", "fp16"))
FAMILIES = ("llama", "qwen2", "gpt2", "gemma2")
LAYER = 1
#: Sizes that the search for the smallest fault tries, half a decade apart.
SIZES = tuple(10.0 ** (-power / 2) for power in range(17))


def main() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--models", nargs="+", choices=GROUPS, default=GROUPS)
    parser.add_argument("--print", action="store_true", dest="only_print")
    given = parser.parse_args()
    if not given.only_print:
        import torch

        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as scratch:
            for part in given.parts:
                PARTS[part](Path(scratch), given.models)
    print_table(json.loads(FILE.read_text(encoding="utf-8")))


def keep(key: str, value: Any) -> None:
    """Put one part into the results, beside those of other parts and runs."""
    known = json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {"benchmark": "faults"}
    known = {**known, key: value, **machine()}
    FILE.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def options() -> Any:
    """Few positions and tokens, default thresholds: more of both only catches more."""
    from mixt_export.verification import VerifyOptions

    return VerifyOptions(positions=40, greedy_tokens=4, memory=False, threads=1, write=False)


def case(name: str, root: Path) -> tuple[Path, Path]:
    """Model folder and clean export of a small model or of SmolLM2's first blocks, made once."""
    from tests.verification.faults.cases import small_case

    model, target, *dtype = name.split()
    if not model.startswith("smollm2"):
        return small_case(name, root)
    folder, source = root / name.replace(" ", "-"), sample()
    if model.endswith("svd"):
        source = root / "smollm2-svd"
        if not source.exists():
            _quietly(mixt("compress", sample(), "-o", source, "--method", "svd", "--keep", "0.5"))
    if not folder.exists():
        extra = ["--num-layers", str(BLOCKS), "--dtype", dtype[0], "--target", target, "--no-verify"]
        _quietly(mixt("export", source, "-o", folder, *extra))
    return source, folder


def _quietly(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True)


def kinds(root: Path, models: list[str]) -> None:
    """Every kind of fault in every model that has what it breaks."""
    from tests.verification.faults.attempt import attempt, expected
    from tests.verification.faults.exported import NotApplicable
    from tests.verification.faults.registry import ANY, KINDS

    for group in models:
        rows = []
        for kind in KINDS:
            cases = {"small": (kind.case,), "others": [name for name in OTHERS if name != kind.case], "real": REAL}[
                group
            ]
            for name in cases:
                model, clean = case(name, root)
                broken = root / "broken"
                shutil.rmtree(broken, ignore_errors=True)
                try:
                    found = attempt(kind, clean, model, broken, LAYER, options())
                except NotApplicable:
                    continue
                named = kind.where == ANY or found.where == expected(kind, LAYER)
                row = {"kind": kind.name, "model": name, "exit_code": found.exit_code, "caught": found.caught}
                row |= {"caught_by": found.caught_by, "where": found.where, "part": found.part, "named": named}
                rows.append({**row, "reason": found.reason, "needed": found.needed, "cpu": round(found.seconds, 2)})
                _say(row)
            keep(f"kinds_{group}", rows)


def clean(root: Path, models: list[str]) -> None:
    """Exports that are right: methods, families, seeds, dtypes and targets. None may raise an alarm.

    Goes on where an earlier run stopped; delete the key ``clean`` of the results to begin anew.
    """
    from tests.tiny import write_tiny

    rows = json.loads(FILE.read_text(encoding="utf-8")).get("clean", []) if FILE.is_file() else []
    done = {(row["method"], row["family"], row["seed"]) for row in rows}
    for seed, method in [(seed, "dense") for seed in SEEDS] + list(enumerate(METHODS, 10)):
        for family in FAMILIES:
            if (method, family, seed) in done:
                continue
            model = write_tiny(root / f"clean-{family}-{seed}", family, seed=seed, tied=bool(seed % 2))
            if method != "dense":
                model = _compressed(model, root / f"clean-{family}-{seed}-{method}", method)
            rows += [_clean(model, root / "clean", method, family, seed, *how) for how in WAYS]
            keep("clean", rows)


def _clean(model: Path, out: Path, method: str, family: str, seed: int, target: str, dtype: str) -> dict[str, Any]:
    """Export and verify one."""
    from mixt_export.targets import export
    from mixt_export.verification import verify

    shutil.rmtree(out, ignore_errors=True)
    export(model, out, target=target, dtype=dtype, verify=False)
    began = time.process_time()
    report = verify(out, model, options=options())
    failed = {check.name: check.reason for check in report.checks if not check.passed}
    used = max(_shares(report), default=0.0)
    row = {"method": method, "family": family, "seed": seed, "target": target, "dtype": dtype}
    row |= {"passed": report.passed, "failed": failed, "share_of_bar": round(used, 4), "checks": len(report.checks)}
    _say(row)
    return {**row, "cpu": round(time.process_time() - began, 2)}


def _shares(report: Any) -> Iterator[float]:
    """Per check how much of its tolerance it needed."""
    for check in report.checks:
        needed, bar = check.metrics.get("rel_l2"), check.metrics.get("tolerance")
        if isinstance(needed, float) and isinstance(bar, float):
            yield needed / bar


def _compressed(model: Path, out: Path, method: str) -> Path:
    """A small model has too few linears for one keep rate to suit every method; the first that is taken is used."""
    from mixt_export import compress
    from mixt_export.errors import MixtError

    for given in METHODS[method]:
        try:
            compress(model, out, method=method, **given)
        except MixtError as error:
            print(f"{method} {given} on {model.name}: {error}", file=sys.stderr)
        else:
            return out
    raise SystemExit(f"{method} takes {model.name} with none of its options")


def sensitivity(root: Path, models: list[str]) -> None:
    """The smallest relative change of one factor, and of one of its output channels, that is still caught."""
    from tests.verification.faults.attempt import judged
    from tests.verification.faults.exported import Exported

    names = [*(["low-rank ort", "low-rank ort fp16"] if "small" in models else []), *(REAL if "real" in models else [])]
    rows = []
    for name in names:
        model, good = case(name, root)
        for fault, change in CHANGES.items():

            def caught(size: float, good: Path = good, model: Path = model, change: Change = change) -> bool:
                broken = root / "scaled"
                shutil.rmtree(broken, ignore_errors=True)
                x = Exported(good, broken)
                linear = x.weights(LAYER, "up_proj")[-1]
                x.put(linear, change(x.value(linear).astype(np.float64), size))
                return judged(x.save(), model, options()).caught

            rows.append({"model": name, "fault": fault, "smallest_caught": _smallest(caught)})
            _say(rows[-1])
    keep("sensitivity", rows)


Change = Callable[[np.ndarray, float], np.ndarray]


def _noise(value: np.ndarray, size: float) -> np.ndarray:
    noise = np.random.default_rng(0).standard_normal(value.shape)
    return value + size * noise * np.linalg.norm(value) / np.linalg.norm(noise)


def _channel(value: np.ndarray, size: float) -> np.ndarray:
    changed = value.copy()
    changed[..., 0] *= 1 - 2 * size
    return changed


#: What is changed by a relative size; a channel at size 1 has its sign flipped.
CHANGES: dict[str, Change] = {"noise on one factor": _noise, "sign of one channel": _channel}


def _smallest(caught: Callable[[float], bool]) -> float | None:
    """The smallest of SIZES that is caught, by bisection; None when not even the largest is."""
    low, high = -1, len(SIZES)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if caught(SIZES[middle]) else (low, middle)
    return SIZES[low] if low >= 0 else None


PARTS: dict[str, Callable[[Path, list[str]], None]] = {"kinds": kinds, "clean": clean, "sensitivity": sensitivity}


def _say(row: dict[str, Any]) -> None:
    print(json.dumps(row), file=sys.stderr, flush=True)


def print_table(found: dict[str, Any]) -> None:
    """Kind × caught by × layer named, then the counts."""
    rows = [row for group in GROUPS for row in found.get(f"kinds_{group}", [])]
    print(table(rows))
    print(f"\n{sum(row['caught'] for row in rows)} of {len(rows)} faults caught, {_named(rows)} named.")
    exports = found.get("clean", [])
    alarms = [row for row in exports if not row["passed"]]
    used = max((row["share_of_bar"] for row in exports), default=0.0)
    print(f"{len(alarms)} alarms at {len(exports)} clean exports; the largest took {100 * used:.0f} % of its bar.")
    for row in found.get("sensitivity", []):
        size = row["smallest_caught"]
        print(f"{row['model']}: {row['fault']} caught from {'nothing' if size is None else f'{size:.1e}'} on")


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one line per kind, over all models that it was put into."""
    lines = ["| fault | caught | first caught by | named |", "|---|---|---|---|"]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        own = [row for row in rows if row["kind"] == kind]
        first = Counter(row["caught_by"][0] if row["caught_by"] else "nothing" for row in own)
        where = Counter(_place(row) for row in own)
        lines.append(
            f"| {kind} | {sum(row['caught'] for row in own)} of {len(own)} | {', '.join(first)} | "
            f"{', '.join(list(where)[:2])} |"
        )
    return "\n".join(lines)


def _place(row: dict[str, Any]) -> str:
    if not row["where"]:
        return "the file" if row["caught_by"] else ""
    return f"{row['where']}: {row['part']}" if row["part"] else str(row["where"])


def _named(rows: list[dict[str, Any]]) -> str:
    return f"{sum(row['named'] for row in rows)} at the right place"


if __name__ == "__main__":
    main()
