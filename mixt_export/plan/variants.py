"""Two forms of one linear in one graph: one for a few tokens, one for many, where a single form serves one badly.

At one row reading weights is what costs, at a hundred it is arithmetic: a tensor train that reads little may multiply
more than the dense matrix. The graph then holds both (what they share once) and takes one by the number of tokens.

Every pair of forms is weighed as a single form would be: time in each regime, relative to that of the dense products,
for the numbers the pair holds. Starting from the pairs that hold no more than is stored, pairs are exchanged for faster
ones in the order of time gained per number while the limit lasts. The result is taken when it is predicted to be
`WORTH` times as fast as the plan with one form each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush
from math import inf
from typing import TypeVar

from mixt_export.errors import UsageError
from mixt_export.network import FactorizedLinear
from mixt_export.plan.choose import Budget, Choice, FormPlan, planned_elements
from mixt_export.plan.cost import Device, seconds
from mixt_export.plan.forms import Form, forms_of, named_forms
from mixt_export.plan.gpu import Gpu
from mixt_export.plan.options import Options

MODES = ("auto", "one", "none")
"""auto: two forms where the plan and the target's measurements say so; one: wherever they are predicted to help, in one
graph; none: one form for each linear."""

WORTH = 1.03
"""Predicted gain over the whole model from which two forms are taken."""

DECODE = 1
"""Rows of the regime of a few tokens; the objective's other rows are those of many."""

_SWITCHES = tuple(1 << power for power in range(1, 8))


_What = TypeVar("_What")


@dataclass(frozen=True)
class _Pair:
    """``few`` and ``many``: the forms; ``score``: weighted share of the dense time; ``elements``: numbers held."""

    few: Form
    many: Form
    score: float
    elements: int


def with_variants(plan: FormPlan, *, fixed: Sequence[str] = (), budget: Budget | None = None) -> FormPlan:
    """``plan`` with a second form for runs of many tokens where that is predicted to pay, else ``plan`` itself.

    ``fixed``: linears whose form was asked for; ``budget``: the limit on bytes, None for that of the objective, which
    has to weigh several regimes (balanced): for any other the plan stays as it is. What linears share stays as it is.
    """
    objective = plan.objective
    if len(objective.weights) < 2 or DECODE not in objective.weights or not objective.guarded:
        return plan
    linears = {name: choice.linear for name, choice in plan.choices.items()}
    times = {name: _times(linear, objective.weights, plan.device) for name, linear in linears.items()}
    totals = {
        rows: sum(found[forms_of(linears[name])[-1].name][rows] for name, found in times.items())
        for rows in objective.weights
    }
    if not linears or min(totals.values()) <= 0:
        return plan
    pairs = {}
    for name, choice in plan.choices.items():
        every = forms_of(choice.linear)
        sensible = Options(choice.linear, every, times[name], objective, set()).forms or every
        forms = (choice.form,) if name in fixed else sensible
        pairs[name] = _pairs(choice.linear, forms, times[name], totals, objective.weights)
    limit = (
        budget.elements
        if budget is not None
        else plan.stored_elements + int(objective.growth * max(0, plan.dense_elements - plan.stored_elements))
    )
    chosen = _exchanged(pairs, max(limit, plan.planned_elements if budget is None else 0))
    if chosen is None:
        return plan
    before = sum(
        _score(choice.form, choice.form, times[name], totals, objective.weights)
        for name, choice in plan.choices.items()
    )
    if before < WORTH * sum(pair.score for pair in chosen.values()):
        return plan
    two = {name: pair for name, pair in chosen.items() if pair.few != pair.many}
    if not two:
        return plan
    switch = _switch(two, linears, plan.device)
    choices = {
        name: _choice(plan.choices[name], chosen[name].few, times[name], two.get(name), switch, few=True)
        for name in linears
    }
    many = {
        name: _choice(plan.choices[name], pair.many, times[name], pair, switch, few=False) for name, pair in two.items()
    }
    made = replace(plan, choices=choices, many=many, switch=switch)
    return plan if budget is not None and made.planned_elements > budget.elements else made


def checked_mode(mode: str, typed: bool) -> str:
    """``mode``, or what auto means. Raises UsageError for another word.

    ``typed``: the target is TensorRT, where nothing was timed; there two forms are taken only when asked for.
    """
    if mode not in MODES:
        raise UsageError(
            f"--variants {mode}: choose from {', '.join(MODES)}; two graphs are not offered, because a "
            "runtime would hold what is not factorised twice."
        )
    return ("none" if typed else "one") if mode == "auto" else mode


def _times(linear: FactorizedLinear, rows: Mapping[int, float], device: Device | Gpu) -> dict[str, dict[int, float]]:
    return {form.name: {count: seconds(form, count, device) for count in rows} for form in named_forms(linear)}


def _score(
    few: Form,
    many: Form,
    times: Mapping[str, Mapping[int, float]],
    totals: Mapping[int, float],
    weights: Mapping[int, float],
) -> float:
    return sum(
        weight * times[(few if rows == DECODE else many).name][rows] / totals[rows] for rows, weight in weights.items()
    )


def _pairs(
    linear: FactorizedLinear,
    forms: Sequence[Form],
    times: Mapping[str, Mapping[int, float]],
    totals: Mapping[int, float],
    weights: Mapping[int, float],
) -> list[_Pair]:
    """Pairs of which none is beaten in numbers and score at once, ascending in numbers."""
    most = [rows for rows in weights if rows != DECODE]

    def prefill(form: Form) -> float:
        return sum(weights[rows] * times[form.name][rows] / totals[rows] for rows in most)

    few = _front([(form.elements, times[form.name][DECODE], form) for form in forms])
    many = _front([(form.elements, prefill(form), form) for form in forms])
    found = {}
    for a in dict.fromkeys(few + many):
        for b in dict.fromkeys(many + few):
            held = planned_elements([Choice(linear, a), Choice(linear, b)])
            found[a.name, b.name] = (held, _score(a, b, times, totals, weights), (a, b))
    return [_Pair(a, b, score, held) for held, score, (a, b) in _fronted(list(found.values()))]


def _front(entries: list[tuple[int, float, Form]]) -> list[Form]:
    return [form for _, _, form in _fronted(entries)]


def _fronted(entries: list[tuple[int, float, _What]]) -> list[tuple[int, float, _What]]:
    """Entries (size, score, what) of which no other is smaller and better, ascending in size."""
    found, best = [], inf
    for entry in sorted(entries, key=lambda entry: entry[:2]):
        if entry[1] < best:
            found.append(entry)
            best = entry[1]
    return found


def _exchanged(pairs: Mapping[str, list[_Pair]], limit: int) -> dict[str, _Pair] | None:
    """A pair for each linear within ``limit`` numbers; None where the smallest do not fit."""
    chosen = {name: found[0] for name, found in pairs.items()}
    spare = limit - sum(pair.elements for pair in chosen.values())
    if spare < 0:
        return None
    number = {name: index for index, name in enumerate(pairs)}

    def best(name: str) -> tuple[float, int, str] | None:
        now = chosen[name]
        rates = [
            (now.score - pair.score) / (pair.elements - now.elements)
            for pair in pairs[name]
            if 0 < pair.elements - now.elements <= spare
        ]
        return (-max(rates), number[name], name) if rates else None

    queue = [entry for name in pairs if (entry := best(name)) is not None]
    heapify(queue)
    while queue:
        rate, _, name = heappop(queue)
        now, entry = chosen[name], best(name)
        if entry is None:
            continue
        if entry[0] > rate:
            heappush(queue, entry)
            continue
        fits = [pair for pair in pairs[name] if 0 < pair.elements - now.elements <= spare]
        pair = max(fits, key=lambda pair: (now.score - pair.score) / (pair.elements - now.elements))
        spare -= pair.elements - now.elements
        chosen[name] = pair
        if (entry := best(name)) is not None:
            heappush(queue, entry)
    return chosen


def _switch(two: Mapping[str, _Pair], linears: Mapping[str, FactorizedLinear], device: Device | Gpu) -> int:
    """The least power of two from which on the forms for many tokens are predicted to be faster together."""
    for tokens in _SWITCHES:
        few, many = (
            sum(seconds(form, tokens, device) for form in forms)
            for forms in ([pair.few for pair in two.values()], [pair.many for pair in two.values()])
        )
        if many < few:
            return tokens
    return _SWITCHES[-1]


def _choice(
    before: Choice,
    form: Form,
    times: Mapping[str, Mapping[int, float]],
    pair: _Pair | None,
    switch: int,
    *,
    few: bool,
) -> Choice:
    """``before`` with ``form``, the gains of it, and a reason that tells of both forms."""
    dense = times[forms_of(before.linear)[-1].name]
    gains = {rows: time / times[form.name][rows] for rows, time in dense.items()}
    if pair is None:
        if form == before.form:
            return before
        share = 100 * form.elements / max(1, before.form.elements)
        reason = f"leaves room for second forms elsewhere: {share:.0f} % of the bytes of {before.form.name}"
        return replace(before, form=form, reason=reason, gains=gains)
    rows = [count for count in gains if (count == DECODE) == few]
    where = f"below {switch} tokens" if few else f"from {switch} tokens on"
    other = pair.many if few else pair.few
    factors = ", ".join(f"{gains[count]:.2f}" for count in rows)
    reason = (
        f"{where}, {other.name} otherwise: {factors} x dense speed at {', '.join(map(str, rows))} rows; both together "
        f"{100 * pair.elements / max(1, forms_of(before.linear)[-1].elements):.0f} % of dense bytes"
    )
    return replace(before, form=form, reason=reason, gains=gains)
