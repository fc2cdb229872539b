"""Whether the planner picks the right form: predicted choice against every candidate measured.

More than 200 cases (structure, shape, rank, rows; see benchmarks/planner_cases.py). All candidates of a case that are
predicted within `HOPELESS` times the best, and the dense matrix, are measured in one process, one thread, thread CPU
time, in random order in every round, each with distinct weights that leave the caches. Compared are medians of paired
ratios. The cost model's constants are never fitted to these measurements: they come from single operators of other
shapes (`mixt calibrate-device`).

    python -m benchmarks.planner                         measure what is missing, then judge
    python -m benchmarks.planner --only 'tt3 .*4096'     some cases
    python -m benchmarks.planner --judge                 judge the kept measurements with today's model
    python -m benchmarks.planner --constants FILE        judge with calibrated constants
    python -m benchmarks.planner --fresh                 measure everything anew

Measurements are kept after each linear: an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, interleaved, machine, timer
from benchmarks.planner_cases import ROWS, linears
from benchmarks.planner_judge import judge
from benchmarks.planner_session import copies_of, session
from mixt_export.calibration.probe import values
from mixt_export.network import FactorizedLinear
from mixt_export.plan import CPU, Form, forms_of, seconds

MEASURED = RESULTS / "planner_measured.json"
HOPELESS = 2.5
"""Times the best prediction from which a form is not measured."""

_SLICE = 3e-3
"""Seconds a form runs at least in one round."""


_LONG = 1.0
"""Seconds in all rounds of one form, where it is slow, ..."""

_LEAST_ROUNDS = 5
"""... but so many rounds."""


def candidates(linear: FactorizedLinear, rows: int) -> list[Form]:
    """Forms worth measuring: the matrix always, the stored cores up to twice as hopeless as others."""
    forms = forms_of(linear)
    predicted = {form.name: seconds(form, rows, CPU) for form in forms}
    best = min(predicted.values())

    def promising(form: Form) -> bool:
        stored = form is forms[0] and predicted[form.name] <= 2 * HOPELESS * best
        return form.dense or stored or predicted[form.name] <= HOPELESS * best

    return [form for form in forms if promising(form)]


def measure(linear: FactorizedLinear, rounds: int, kept: dict[str, Any]) -> dict[str, Any]:
    """Per number of rows and form the seconds of one linear in each round; ``kept``: the session of the last matrix."""
    chosen = {rows: candidates(linear, rows) for rows in ROWS}
    shape = f"{linear.in_features}x{linear.out_features}"
    models: dict[str, tuple[Any, int]] = {}
    for form in {form.name: form for forms in chosen.values() for form in forms}.values():
        if form.dense and shape not in kept:
            kept.clear()
            kept[shape] = session(linear, form)
        models[form.name] = kept[shape] if form.dense else session(linear, form), copies_of(form)
    result: dict[str, Any] = {}
    for rows in ROWS:
        x = values((1, rows, linear.in_features), 1)
        runs, longest = {}, 0.0
        for form in chosen[rows]:
            model, copies = models[form.name]
            once = min(timer(model, x, 1), timer(model, x, 1))
            longest = max(longest, once)
            repeats = max(1, min(20, round(_SLICE / once)))
            runs[form.name] = partial(lambda model, x, n, c: timer(model, x, n) / c, model, x, repeats, copies)
        taken = interleaved(runs, max(_LEAST_ROUNDS, min(rounds, round(_LONG / longest))))
        result[str(rows)] = {name: [float(f"{value:.4g}") for value in times] for name, times in taken.items()}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", default="", help="regular expression on the cases' names")
    parser.add_argument("--judge", action="store_true")
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--constants", type=Path)
    parser.add_argument("--minutes", type=float, default=1e9, help="stop measuring after so long")
    options = parser.parse_args()
    device = CPU
    if options.constants:
        from mixt_export.calibration import load_device

        device = load_device(options.constants)
    known: dict[str, Any] = {"cases": {}}
    if MEASURED.is_file() and not options.fresh:
        known = json.loads(MEASURED.read_text())
    known |= machine()
    began, kept = time.monotonic(), {}
    for name, linear in () if options.judge else linears():
        if not re.search(options.only, name) or name in known["cases"]:
            continue
        if time.monotonic() - began > 60 * options.minutes:
            print("out of time; run again to go on", file=sys.stderr)
            break
        known["cases"][name] = measure(linear, options.rounds, kept)
        _keep(known)
        rows = known["cases"][name]["1"]
        print(f"{name}: {len(rows)} forms, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    verdict = judge(known["cases"], device)
    text = json.dumps({"benchmark": "planner", "threads": 1, **verdict, **machine()}, indent=1)
    (RESULTS / "planner.json").write_text(text + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in verdict.items() if key != "cases"}, indent=1))


def _keep(known: dict[str, Any]) -> None:
    """Write ``known`` whole or not at all."""
    RESULTS.mkdir(exist_ok=True)
    part = MEASURED.with_suffix(".part")
    part.write_text(json.dumps(known) + "\n", encoding="utf-8")
    part.replace(MEASURED)


if __name__ == "__main__":
    main()
