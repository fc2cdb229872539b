"""Judge the planner's choices by measured times: no model runs here."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from benchmarks.planner_cases import ROWS, linears
from mixt_export.network import FactorizedLinear
from mixt_export.plan import OBJECTIVES, Device, Form, choose_forms, forms_of, seconds

NEAR = 1.10
"""A choice is right when it takes at most this many times as long as the best candidate."""

SEEN = ("576x576", "576x1536", "2048x2048")
"""Shapes whose cases were looked at while the terms of the model were chosen. No constant was fitted to any of them."""

Times = Mapping[str, list[float]]
"""Form -> seconds in each round."""

#: Limit on the numbers a form holds: the policies that are judged.
LIMITS: dict[str, Callable[[FactorizedLinear, int], float]] = {
    "any bytes": lambda linear, stored: float("inf"),
    "half of what was saved": lambda linear, stored: (stored + linear.in_features * linear.out_features) / 2,
    "stored bytes": lambda linear, stored: stored,
}


def judge(cases: Mapping[str, Mapping[str, Times]], device: Device) -> dict[str, Any]:
    """Shares of right choices, slowdowns, shares of the roofline gain, by policy; and every case."""
    structures = dict(linears())
    found: dict[str, Any] = {}
    for name, measured in cases.items():
        linear = structures[name]
        forms = {form.name: form for form in forms_of(linear)}
        for rows in ROWS:
            for policy, limit in LIMITS.items():
                most = limit(linear, forms_of(linear)[0].elements)
                one = _single(linear, forms, measured[str(rows)], rows, most, device)
                found[f"{name} rows {rows} | {policy}"] = one
        found[f"{name} | balanced"] = _balanced(linear, forms, measured, device)
    policies = {policy: _summary(found, policy) for policy in (*LIMITS, "balanced")}
    return {
        "device": device.as_dict(),
        "linears": len(cases),
        "cases": found,
        "policies": policies,
        "roofline": roofline(cases, found),
        "accuracy of the model": _accuracy(cases, structures, device),
    }


def ratio(slow: Iterable[float], fast: Iterable[float]) -> float:
    """Median of paired ratios."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def _single(
    linear: FactorizedLinear, forms: Mapping[str, Form], times: Times, rows: int, limit: float, device: Device
) -> dict[str, Any]:
    """One regime: the form with the least predicted time among those within the limit (the smallest where none is)."""
    least = min(form.elements for form in forms.values())
    allowed = [form for form in forms.values() if form.elements <= max(limit, least)]
    chosen = min(allowed, key=lambda form: (seconds(form, rows, device), form.elements)).name
    measured = [form.name for form in allowed if form.name in times]
    best = min(measured, key=lambda name: statistics.median(times[name]), default="")
    if chosen not in times:
        return {"chosen": chosen, "best": best, "of": len(measured), "measured": False}
    return {
        "chosen": chosen,
        "best": best,
        "of": len(measured),
        "measured": True,
        "times the best": round(max(1.0, ratio(times[chosen], times[best])), 3),
        "times dense": round(ratio(times[chosen], times["dense"]), 3),
    }


def _balanced(
    linear: FactorizedLinear, forms: Mapping[str, Form], measured: Mapping[str, Times], device: Device
) -> dict[str, Any]:
    """What `mixt export` takes by default for a model of such linears, by its own score with measured times."""
    objective = OBJECTIVES["balanced"]
    chosen = choose_forms([linear], device=device).choices[linear.name].form.name
    limit = LIMITS["half of what was saved"](linear, forms_of(linear)[0].elements)

    def relative(name: str) -> dict[int, float]:
        return {rows: ratio(measured[str(rows)][name], measured[str(rows)]["dense"]) for rows in objective.weights}

    known = {
        name: relative(name)
        for name, form in forms.items()
        if (form.elements <= limit or name == chosen) and all(name in measured[str(rows)] for rows in objective.weights)
    }
    scores = {name: sum(objective.weights[rows] * times[rows] for rows in times) for name, times in known.items()}
    sound = {name: score for name, score in scores.items() if max(known[name].values()) <= 1.05} or scores
    best = min(sound, key=lambda name: sound[name], default="")
    if chosen not in known:
        return {"chosen": chosen, "best": best, "of": len(known), "measured": False}
    return {
        "chosen": chosen,
        "best": best,
        "of": len(known),
        "measured": True,
        "times the best": round(max(1.0, scores[chosen] / scores[best]), 3),
        "times dense": round(max(known[chosen].values()), 3),
    }


def _summary(found: Mapping[str, Mapping[str, Any]], policy: str) -> dict[str, Any]:
    cases = {name: one for name, one in found.items() if name.endswith(f"| {policy}")}
    measured = {name: one for name, one in cases.items() if one["measured"]}
    if not measured:
        return {"cases": 0}
    right = [name for name, one in measured.items() if one["times the best"] <= NEAR]
    worst = sorted(measured, key=lambda name: -measured[name]["times the best"])[:12]
    slow = sorted(measured, key=lambda name: -measured[name]["times dense"])[:5]
    return {
        "cases": len(measured),
        "not measured": len(cases) - len(measured),
        "share within 10 % of the best": round(len(right) / len(measured), 4),
        "share by shape": _by_shape(measured),
        "times the best, 95th percentile": _quantile([one["times the best"] for one in measured.values()], 0.95),
        "furthest from the best": {name: measured[name] for name in worst},
        "slowest against dense": {name: measured[name]["times dense"] for name in slow},
    }


def _by_shape(measured: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Share within `NEAR` for each shape, of `SEEN` together, and of the others together: the model's hold-out."""
    shares: dict[str, list[bool]] = {}
    for name, one in measured.items():
        shape = next(word for word in name.split() if "x" in word and word[0].isdigit())
        group = "shapes seen by the model's author" if shape in SEEN else "held out"
        for key in (shape, group):
            shares.setdefault(key, []).append(one["times the best"] <= NEAR)
    return {key: round(statistics.mean(right), 4) for key, right in shares.items()}


def _quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]


def roofline(cases: Mapping[str, Mapping[str, Times]], found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Share of the roofline gain kept by the form chosen for each number of rows, tensor trains and Tucker, >= 2048².

    The roofline gain is the ratio of max(2 · multiply-adds / peak, bytes / bandwidth); peak and bandwidth are what the
    dense 4096x4096 product reaches at 128 rows and at 1 row in the same measurements.
    """
    square = [measured for name, measured in cases.items() if name.endswith("4096x4096")]
    if not square:
        return {}
    peak = 2 * 128 * 4096**2 / min(statistics.median(measured["128"]["dense"]) for measured in square)
    bandwidth = 4 * 4096**2 / min(statistics.median(measured["1"]["dense"]) for measured in square)
    structures = dict(linears())

    def roof(form: Form, rows: int) -> float:
        return max(2 * form.macs * rows / peak, 4 * form.elements / bandwidth)

    shares: dict[str, dict[str, float]] = {str(rows): {} for rows in ROWS}
    for name in cases:
        method, *_, shape = name.split()
        if not method.startswith(("tt", "tucker")) or min(map(int, shape.split("x"))) < 2048:
            continue
        forms = {form.name: form for form in forms_of(structures[name])}
        for rows in ROWS:
            one = found[f"{name} rows {rows} | any bytes"]
            if one["measured"]:
                gain = roof(forms["dense"], rows) / roof(forms[one["chosen"]], rows)
                shares[str(rows)][name] = round(1 / one["times dense"] / gain, 3)
    medians = {rows: round(statistics.median(values.values()), 3) for rows, values in shares.items() if values}
    return {"GFLOP/s": round(peak / 1e9, 1), "GB/s": round(bandwidth / 1e9, 1), "median kept": medians, "kept": shares}


def _accuracy(
    cases: Mapping[str, Mapping[str, Times]], structures: Mapping[str, FactorizedLinear], device: Device
) -> dict[str, Any]:
    """How far predicted times relative to dense are from measured ones, over all measured forms, by rows."""
    errors: dict[str, list[float]] = {str(rows): [] for rows in ROWS}
    for name, measured in cases.items():
        forms = {form.name: form for form in forms_of(structures[name])}
        for rows, times in measured.items():
            dense = seconds(forms["dense"], int(rows), device)
            for form, taken in times.items():
                if form in forms and form != "dense":
                    predicted = seconds(forms[form], int(rows), device) / dense
                    errors[rows].append(predicted / ratio(taken, times["dense"]) - 1)
    return {
        rows: {
            "forms": len(values),
            "median": round(statistics.median(values), 3),
            "median of |error|": round(statistics.median(map(abs, values)), 3),
            "90 % below": round(_quantile([abs(value) for value in values], 0.9), 3),
        }
        for rows, values in errors.items()
        if values
    }
