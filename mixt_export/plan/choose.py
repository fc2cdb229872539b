"""Choose a form for every MixT linear of a model: least predicted time within a limit on bytes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from math import prod

from mixt_export.errors import UsageError
from mixt_export.network import FactorizedLinear
from mixt_export.plan.cost import CPU, Device, seconds
from mixt_export.plan.forms import Form, forms_of
from mixt_export.plan.mixture import Mixture

SLOWER = 1.05
"""A form may take this many times as long as the dense product in any regime, where another form avoids more."""


@dataclass(frozen=True)
class Objective:
    """What an export is optimised for.

    ``weights``: rows (tokens in one run) -> weight of that regime's time, relative to the time of the dense products.
    ``growth``: the share of the bytes saved by the factors that merging may give back, over all MixT linears together.
    ``guarded``: forms that are slower than dense by more than `SLOWER` in a regime are avoided where others fit.
    """

    name: str
    weights: Mapping[int, float]
    growth: float
    guarded: bool


OBJECTIVES = {
    objective.name: objective
    for objective in (
        Objective("balanced", {1: 0.3, 16: 0.3, 128: 0.4}, growth=0.5, guarded=True),
        Objective("decode", {1: 1.0}, growth=0.5, guarded=False),
        Objective("prefill", {16: 0.5, 128: 0.5}, growth=0.5, guarded=False),
        Objective("memory", {1: 0.3, 16: 0.3, 128: 0.4}, growth=0.0, guarded=False),
    )
}


@dataclass(frozen=True)
class Choice:
    """The form of one linear, why, and how many times faster than dense it is predicted to be, by rows."""

    mixture: Mixture
    form: Form
    reason: str
    gains: Mapping[int, float]


@dataclass(frozen=True)
class FormPlan:
    """Forms of all MixT linears of a model. Elements are numbers of weights, biases not counted."""

    objective: Objective
    device: Device
    choices: Mapping[str, Choice]

    @property
    def stored_elements(self) -> int:
        """What the model folder holds: every core once, also where several terms or linears share it."""
        return sum(self.cores().values())

    def cores(self) -> dict[str, int]:
        """Name -> number of elements of every core."""
        mixtures = [choice.mixture for choice in self.choices.values()]
        return {term.tensor: prod(mixture.core_shape) for mixture in mixtures for term in mixture.terms}

    @property
    def planned_elements(self) -> int:
        """What the graph will hold."""
        return sum(choice.form.elements for choice in self.choices.values())

    @property
    def dense_elements(self) -> int:
        """What the dense matrices would hold."""
        return sum(choice.form.in_features * choice.form.out_features for choice in self.choices.values())


def objective_named(name: str) -> Objective:
    """The objective ``name``; raises UsageError with the names that exist."""
    try:
        return OBJECTIVES[name]
    except KeyError:
        raise UsageError(f"--optimize-for {name}: is none of {', '.join(OBJECTIVES)}.") from None


def choose_forms(
    linears: Iterable[FactorizedLinear],
    optimize_for: str = "balanced",
    overrides: Sequence[tuple[str, str]] = (),
    device: Device = CPU,
) -> FormPlan:
    """A form for every MixT among ``linears``; others are left out.

    Starting from the fastest forms that hold no more numbers than are stored, forms are exchanged for faster ones in
    the order of time gained per byte while the limit of the objective lasts; first those that a guarded objective calls
    too slow. overrides: (regular expression on the linear's name, name of a form), the last match wins; they are
    followed whatever they cost. Raises UsageError for an unknown objective, an expression that is invalid or matches no
    MixT linear, and a form that a linear does not have.
    """
    objective = objective_named(optimize_for)
    options: dict[str, _Options] = {}
    alike: dict[object, _Times] = {}
    for linear in linears:
        mixture = Mixture.of(linear)
        if mixture is None:
            continue
        forms = forms_of(mixture, bias=linear.bias is not None)
        key = (mixture.in_features, mixture.out_features, forms[-1].bias, mixture.core_shape, len(mixture.terms))
        if key not in alike:
            alike[key] = {
                form.name: {rows: seconds(form, rows, device) for rows in objective.weights} for form in forms
            }
        options[linear.name] = _Options(mixture, forms, alike[key], objective)
    forced = _forced(options, overrides)
    totals = {rows: sum(o.times[o.dense.name][rows] for o in options.values()) for rows in objective.weights}
    for option in options.values():
        option.score(totals)
    chosen = {name: forced.get(name, option.smallest()) for name, option in options.items()}
    free = {name: option for name, option in options.items() if name not in forced}
    saved = sum(option.dense.elements - option.mixture.stored_elements for option in free.values())
    spare = int(objective.growth * saved) - sum(
        max(0, chosen[name].elements - option.mixture.stored_elements) for name, option in free.items()
    )
    if objective.guarded:
        spare = _repair(free, chosen, spare)
    _improve(free, chosen, spare)
    choices = {}
    for name, option in options.items():
        reason = f"asked for by --form, {option.facts(chosen[name])}" if name in forced else option.reason(chosen[name])
        choices[name] = Choice(option.mixture, chosen[name], reason, option.gains(chosen[name]))
    return FormPlan(objective, device, choices)


_Times = Mapping[str, Mapping[int, float]]
"""Name of a form -> rows -> predicted seconds."""


class _Options:
    """The forms of one linear with their predicted times and scores, by name."""

    def __init__(self, mixture: Mixture, forms: tuple[Form, ...], times: _Times, objective: Objective) -> None:
        self.mixture, self.forms, self.times, self.objective = mixture, forms, times, objective
        self.dense = forms[-1]
        self.scores: dict[str, float] = {}

    def score(self, totals: Mapping[int, float]) -> None:
        """Weighted share of the model's dense time in each regime."""
        weights = self.objective.weights
        self.scores = {
            name: sum(weights[rows] * time / totals[rows] for rows, time in times.items())
            for name, times in self.times.items()
        }

    def smallest(self) -> Form:
        """The fastest of the forms that hold no more than is stored, else of those that hold least."""
        limit = max(self.mixture.stored_elements, min(form.elements for form in self.forms))
        return self.fastest(form for form in self.forms if form.elements <= limit)

    def fastest(self, forms: Iterable[Form]) -> Form:
        """The one with the best score; the smaller one where two are alike."""
        return min(forms, key=lambda form: (self.scores[form.name], form.elements))

    def exchange(self, now: Form, spare: int) -> tuple[float, Form] | None:
        """The exchange of ``now`` that gains most time per number among those ``spare`` allows, with that rate."""
        best: tuple[float, Form] | None = None
        for form in self.forms:
            gain, cost = self.scores[now.name] - self.scores[form.name], form.elements - now.elements
            if gain <= 0 or cost > spare or (self.objective.guarded and self.slow(form)):
                continue
            rate = gain / max(cost, 1)
            if best is None or rate > best[0]:
                best = (rate, form)
        return best

    def gains(self, form: Form) -> dict[int, float]:
        """Predicted times faster than the dense product, by rows."""
        return {rows: time / self.times[form.name][rows] for rows, time in self.times[self.dense.name].items()}

    def slow(self, form: Form) -> bool:
        """Whether ``form`` is slower than the dense product by more than `SLOWER` in some regime."""
        return min(self.gains(form).values()) * SLOWER < 1

    def facts(self, form: Form) -> str:
        """Bytes and predicted gains of ``form``."""
        gains = sorted(self.gains(form).items())
        factors, rows = ", ".join(f"{gain:.2f}" for _, gain in gains), ", ".join(str(rows) for rows, _ in gains)
        share = 100 * form.elements / self.dense.elements
        return f"{share:.1f} % of dense bytes, {factors} x dense speed at {rows} rows"

    def reason(self, form: Form) -> str:
        """Why ``form`` was chosen, in one sentence."""
        fastest = self.fastest(self.forms)
        sound = [other for other in self.forms if not self.slow(other)]
        if form == fastest:
            why = f"fastest for {self.objective.name}"
        elif self.objective.guarded and sound and form == self.fastest(sound):
            why = "fastest that is nowhere slower than dense"
        elif self.objective.growth == 0.0:
            why = f"fastest that holds no more than is stored ({fastest.name} would be faster)"
        else:
            why = f"fastest within the limit on bytes ({fastest.name} would be faster)"
        return f"{why}: {self.facts(form)}"


def _repair(options: Mapping[str, _Options], chosen: dict[str, Form], spare: int) -> int:
    """Exchange forms that are too slow in some regime, the cheapest first; returns what is left of ``spare``."""
    exchanges = []
    for name, option in options.items():
        sound = [form for form in option.forms if not option.slow(form)]
        if option.slow(chosen[name]) and sound:
            least = min(sound, key=lambda form: (form.elements, option.scores[form.name]))
            exchanges.append((least.elements - chosen[name].elements, name, least))
    for cost, name, form in sorted(exchanges, key=lambda exchange: exchange[:2]):
        if cost <= spare:
            chosen[name], spare = form, spare - cost
    return spare


def _improve(options: Mapping[str, _Options], chosen: dict[str, Form], spare: int) -> None:
    """Exchange forms for faster ones, the most time per byte first, while ``spare`` elements last."""
    queue: list[tuple[float, int, str]] = []
    number = {name: index for index, name in enumerate(options)}

    def enqueue(name: str) -> None:
        found = options[name].exchange(chosen[name], spare)
        if found is not None:
            heappush(queue, (-found[0], number[name], name))

    for name in options:
        enqueue(name)
    while queue:
        rate, _, name = heappop(queue)
        found = options[name].exchange(chosen[name], spare)
        if found is None:
            continue
        if -found[0] > rate:  # what it waited for no longer fits: back in line with what does
            enqueue(name)
            continue
        spare -= found[1].elements - chosen[name].elements
        chosen[name] = found[1]
        enqueue(name)


def _forced(options: Mapping[str, _Options], overrides: Sequence[tuple[str, str]]) -> dict[str, Form]:
    forced = {}
    for pattern, wanted in overrides:
        try:
            expression = re.compile(pattern)
        except re.error as error:
            raise UsageError(f"--form {pattern}={wanted}: the expression is invalid ({error}).") from None
        matched = [name for name in options if expression.search(name)]
        if not matched:
            raise UsageError(f"--form {pattern}={wanted}: no MixT linear of the model matches the expression.")
        for name in matched:
            found = {form.name: form for form in options[name].forms}
            if wanted not in found:
                raise UsageError(f"--form {pattern}={wanted}: {name} has no such form; it has {', '.join(found)}.")
            forced[name] = found[wanted]
    return forced
