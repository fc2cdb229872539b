"""Choose a form for every factorised linear of a model: least predicted time within a limit on bytes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

from mixt_export.errors import ResourceError, UsageError
from mixt_export.network import FactorizedLinear
from mixt_export.plan.cost import CPU, Device, seconds
from mixt_export.plan.forms import Form, forms_of, named_forms
from mixt_export.plan.gpu import Gpu
from mixt_export.plan.mixture import Mixture
from mixt_export.plan.networks import NetworkForm
from mixt_export.plan.objectives import Objective, objective_named
from mixt_export.plan.options import Options, Times, parts, tensor_of
from mixt_export.plan.sharing import Sharing, share


@dataclass(frozen=True)
class Choice:
    """The form of one linear, why, and how many times faster than dense it is predicted to be, by rows."""

    linear: FactorizedLinear
    form: Form
    reason: str = ""
    gains: Mapping[int, float] = field(default_factory=dict)

    @property
    def mixture(self) -> Mixture | None:
        """What the linear is where it is a MixT."""
        return Mixture.of(self.linear)

    def held(self) -> dict[object, int]:
        """What the graph holds for the linear -> numbers; a stored tensor in one layout has one key for all linears."""
        name, form = self.linear.name, self.form
        if not isinstance(form, NetworkForm) or not form.reads:
            return {(name, form.name): form.elements}
        found: dict[object, int] = {}
        for read in form.reads:
            key = tensor_of(self.linear, read) if len(read.group) == 1 else (name, read.branch, read.group)
            found[key, read.perm] = read.elements
        if self.linear.sparse is not None:
            found[self.linear.sparse.values.name] = self.linear.sparse.nnz
        return found


@dataclass(frozen=True)
class Budget:
    """A limit on the bytes of all weights of a graph: ``elsewhere`` are those of everything that is not factorised."""

    nbytes: int
    elsewhere: int
    itemsize: int

    @property
    def elements(self) -> int:
        """Numbers that the factorised linears may hold."""
        return (self.nbytes - self.elsewhere) // self.itemsize


@dataclass(frozen=True)
class FormPlan:
    """Forms of all factorised linears of a model. Elements are numbers of weights, biases not counted.

    Where linears share first steps, ``choices`` holds these under a name of their own, and of the linears the rest.
    """

    objective: Objective
    device: Device | Gpu
    choices: Mapping[str, Choice]
    einsum: bool = False
    """Networks are written as one Einsum for each core, to be read."""
    sharing: Sharing = field(default_factory=Sharing)
    """What is computed once for several linears."""
    many: Mapping[str, Choice] = field(default_factory=dict)
    """Linears that runs of ``switch`` tokens and more execute in another form than in ``choices``, see variants."""
    switch: int = 0

    @property
    def stored_elements(self) -> int:
        """What the model folder holds: every core once, also where several terms or linears share it."""
        return stored_elements(self.choices.values())

    def cores(self) -> dict[str, int]:
        """Name -> number of elements of every core, and of the values of every sparse residual."""
        return {name: size for choice in self.choices.values() for name, size in parts(choice.linear).items()}

    @property
    def planned_elements(self) -> int:
        """What the graph will hold."""
        return planned_elements((*self.choices.values(), *self.many.values()))

    @property
    def dense_elements(self) -> int:
        """What the dense matrices would hold."""
        heads = self.sharing.heads
        return sum(
            self.choices[self.sharing.first(name)].form.in_features * choice.form.out_features
            for name, choice in self.choices.items()
            if name not in heads
        )


def planned_elements(choices: Iterable[Choice]) -> int:
    """Numbers of weights that a graph holds which executes ``choices``."""
    return sum({key: size for choice in choices for key, size in choice.held().items()}.values())


def stored_elements(choices: Iterable[Choice]) -> int:
    """Numbers of weights that a model folder holds for the linears of ``choices``."""
    return sum({name: size for choice in choices for name, size in parts(choice.linear).items()}.values())


def choose_forms(
    linears: Iterable[FactorizedLinear],
    optimize_for: str = "balanced",
    overrides: Sequence[tuple[str, str]] = (),
    device: Device | Gpu = CPU,
    *,
    budget: Budget | None = None,
    itemsize: int = 4,
    einsum: bool = False,
) -> FormPlan:
    """A form for every one of ``linears``, of first steps they share once (see sharing; not where overrides match).

    Starting from the fastest forms that hold no more numbers than are stored, forms are exchanged for faster ones in
    the order of time gained per byte while the limit lasts (``budget``, else that of the objective, which an objective
    that lets nothing grow keeps); first those that a guarded objective calls too slow. Forms of more than `NAIVE` times
    the dense work are taken only where the budget leaves nothing else. overrides: (regular expression on the linear's
    name, name of a form), the last match wins; they are followed whatever they cost. itemsize: bytes of a weight, for
    what the reasons say. einsum: see FormPlan.

    Raises UsageError for an unknown objective, an expression that is invalid or matches no factorised linear, and a
    form that a linear does not have; ResourceError when no forms fit into the budget, saying what the smallest need;
    NetworkError as ``network.best_order``.
    """
    objective = objective_named(optimize_for)
    given = list(linears)
    apart = frozenset(linear.name for linear in given if _matches(linear.name, overrides))
    dense = {linear.name: linear.in_features * linear.out_features for linear in given}
    sharing = share(given, objective, device, apart)
    given = list(sharing.networks.values())
    uses = Counter(name for linear in given for name in parts(linear))
    shared = {name for name, count in uses.items() if count > 1}
    alike: dict[tuple[Form, ...], Times] = {}
    options: dict[str, Options] = {}
    for linear in given:
        forms = named_forms(linear) if linear.name in apart else forms_of(linear)
        if forms not in alike:
            alike[forms] = {
                form.name: {rows: seconds(form, rows, device) for rows in objective.weights} for form in forms
            }
        options[linear.name] = Options(linear, forms, alike[forms], objective, shared)
    forced = _forced(options, overrides)
    totals = {rows: sum(o.times[o.dense.name][rows] for o in options.values()) for rows in objective.weights}
    for option in options.values():
        option.score(totals)
    chosen = _smallest(options, forced)
    free = {name: option for name, option in options.items() if name not in forced}
    stored = {name: size for option in free.values() for name, size in parts(option.linear).items()}
    saved = sum(size for name, size in dense.items() if name not in forced) - sum(stored.values())
    grown = sum(max(0, option.size(chosen[name]) - option.stored) for name, option in free.items())
    spare = int(objective.growth * saved) - grown
    limit = "that holds no more than is stored" if objective.growth == 0.0 else "within the limit on bytes"
    if budget is not None:
        left = _fit(options, free, chosen, budget)
        if objective.growth or left < spare:
            spare, limit = left, "within the memory budget"
    if objective.guarded:
        spare = _repair(free, chosen, spare)
    _improve(free, chosen, spare)
    choices = {}
    for name, option in options.items():
        form = chosen[name]
        why = f"asked for by --form, {option.facts(form)}" if name in forced else option.reason(form, itemsize, limit)
        head = sharing.reads.get(name)
        why = why if head is None else f"the rest after {head.split('.')[-2]}'s {head.split('.')[-1]}: {why}"
        choices[name] = Choice(option.linear, form, why, option.gains(form))
    return FormPlan(objective, device, choices, einsum, sharing)


def _smallest(options: Mapping[str, Options], forced: Mapping[str, Form]) -> dict[str, Form]:
    """The fastest forms that hold no more than is stored: of linears that share tensors either all together or none."""
    ways = [
        {name: forced.get(name, option.smallest(alone=alone)) for name, option in options.items()}
        for alone in (True, False)
    ]
    return min(ways, key=lambda way: (_held(options, way), sum(options[name].scores[way[name].name] for name in way)))


def _held(options: Mapping[str, Options], chosen: Mapping[str, Form]) -> int:
    """Numbers that the graph holds with ``chosen``."""
    return planned_elements(Choice(options[name].linear, form) for name, form in chosen.items())


def _fit(options: Mapping[str, Options], free: Mapping[str, Options], chosen: dict[str, Form], budget: Budget) -> int:
    """Make ``chosen`` as small as ``budget`` demands, naive forms last; returns the numbers left over."""
    found = []
    for naive in (None, False, True):
        if naive is not None:
            chosen.update({name: option.least(naive=naive) for name, option in free.items()})
        spare = budget.elements - _held(options, chosen)
        if spare >= 0:
            return spare
        found.append(spare)
    # What is least for each linear alone may hold more than forms that read the same tensors.
    smallest = budget.elsewhere + (budget.elements - max(found)) * budget.itemsize
    raise ResourceError(
        f"--memory-budget: the weights need at least {-(-smallest // 1000) / 1e3:,.3f} MB, the budget is "
        f"{budget.nbytes / 1e6:,.3f} MB ({budget.elsewhere / 1e6:,.3f} MB of them are not factorised); "
        "raise it, choose a narrower dtype, or compress more."
    )


def _repair(options: Mapping[str, Options], chosen: dict[str, Form], spare: int) -> int:
    """Exchange forms that are too slow in some regime, the cheapest first; returns what is left of ``spare``."""
    exchanges = []
    for name, option in options.items():
        sound = [form for form in option.forms if not option.slow(form)]
        if option.slow(chosen[name]) and sound:
            least = min(sound, key=lambda form: (form.elements, option.scores[form.name]))
            exchanges.append((option.size(least) - option.size(chosen[name]), name, least))
    for cost, name, form in sorted(exchanges, key=lambda exchange: exchange[:2]):
        if cost <= spare:
            chosen[name], spare = form, spare - cost
    return spare


def _improve(options: Mapping[str, Options], chosen: dict[str, Form], spare: int) -> None:
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
        spare -= options[name].size(found[1]) - options[name].size(chosen[name])
        chosen[name] = found[1]
        enqueue(name)


def _matches(name: str, overrides: Sequence[tuple[str, str]]) -> bool:
    return any(_compiled(pattern, wanted).search(name) for pattern, wanted in overrides)


def _compiled(pattern: str, wanted: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UsageError(f"--form {pattern}={wanted}: the expression is invalid ({error}).") from None


def _forced(options: Mapping[str, Options], overrides: Sequence[tuple[str, str]]) -> dict[str, Form]:
    forced = {}
    for pattern, wanted in overrides:
        expression = _compiled(pattern, wanted)
        matched = [name for name in options if expression.search(name)]
        if not matched:
            raise UsageError(f"--form {pattern}={wanted}: no factorised linear of the model matches the expression.")
        for name in matched:
            found = {form.name: form for form in named_forms(options[name].linear)}
            if wanted not in found:
                raise UsageError(f"--form {pattern}={wanted}: {name} has no such form; it has {', '.join(found)}.")
            forced[name] = found[wanted]
    return forced
