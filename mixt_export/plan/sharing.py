"""What linears of one module have in common, computed once: first steps with the same cores on the same input.

q, k and v of one attention (TensorLLM's U1), gate and up of one MLP, or linears over a shared basis begin with the same
products. Such a prefix becomes a linear of its own, the *head*, and each of them keeps the rest, its *tail*, which
reads the head's output: y_i = tail_i(head(x)). Heads and tails are ordinary linears, so their forms are chosen as
those of any other. Heads may read heads.

First factors that differ are not put side by side into one product: on ONNX Runtime's CPU that gains nothing (0.95 to
1.08 times as fast, 1 to 128 rows, 576 to 4096 features; docs/tucker.md), and the copy it needs can no longer be read in
place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache

from mixt_export.network import Branch, FactorizedLinear
from mixt_export.network.order import steps
from mixt_export.plan.cost import CPU, Device, seconds
from mixt_export.plan.forms import forms_of, structure
from mixt_export.plan.gpu import Gpu
from mixt_export.plan.objectives import Objective

_NAMED = 4
"""Linears up to which a head is called after all of them."""


@dataclass(frozen=True)
class Sharing:
    """``networks``: name -> what is executed: a head, the tail of a linear, or a linear that shares nothing, whole.

    Heads stand before what reads them. ``reads``: name -> the head whose output it reads; others read the input.
    """

    networks: Mapping[str, FactorizedLinear] = field(default_factory=dict)
    reads: Mapping[str, str] = field(default_factory=dict)

    @property
    def heads(self) -> tuple[str, ...]:
        """Names of the heads."""
        return tuple(dict.fromkeys(self.reads.values()))

    def first(self, name: str) -> str:
        """The head that reads the input of the linear ``name``; ``name`` itself where there is none."""
        while name in self.reads:
            name = self.reads[name]
        return name


def share(
    linears: Iterable[FactorizedLinear],
    objective: Objective,
    device: Device | Gpu = CPU,
    apart: frozenset[str] = frozenset(),
) -> Sharing:
    """Heads and tails of ``linears`` where they save time; a linear named in ``apart`` shares nothing.

    Linears share with others of the same module (their names differ in the last part only); whether they are really
    given the same input is for the lowering to see. A head pays where it and its tails, each in its fastest form, take
    less time than the linears in theirs, none of them holding more than the objective's growth allows.
    """
    networks: dict[str, FactorizedLinear] = {}
    reads: dict[str, str] = {}
    modules: dict[str, dict[str, FactorizedLinear]] = {}
    for linear in linears:
        modules.setdefault(linear.name.rpartition(".")[0], {})[linear.name] = linear
    for members in modules.values():
        free = {name: linear for name, linear in members.items() if name not in apart}
        found = _Search.over(free, objective, device).best(free) if len(free) > 1 else _Found()
        networks |= found.networks
        reads |= found.reads
        networks |= {name: linear for name, linear in members.items() if name not in networks}
    return Sharing(networks, reads)


def shared_again(
    linears: Mapping[str, FactorizedLinear], reads: Mapping[str, str], cores: Mapping[str, str]
) -> dict[str, FactorizedLinear]:
    """The networks of a `Sharing` once more, from what is written of it: ``cores`` are the tensors of its heads.

    Heads in the order of their `Sharing`; one that no linear can begin with is left out.
    """
    networks = dict(linears)
    for head, tensor in cores.items():
        for name in linears:
            before, seen = reads.get(name), {name}
            while before is not None and before != head and before not in seen:
                seen.add(before)
                before = reads.get(before)
            branches = networks[name].branches
            place = [core.tensor.name for core in branches[0].cores] if len(branches) == 1 else []
            if before == head and len(place) > 1 and tensor in place:
                networks[head], networks[name] = split(networks[name], place.index(tensor), head)
    return networks


def split(linear: FactorizedLinear, core: int, name: str) -> tuple[FactorizedLinear, FactorizedLinear]:
    """(head, tail) of ``linear``, one branch: the step with core number ``core`` as ``name``, and the other steps.

    Scale and bias stay with the tail. Raises NetworkError when the step cannot come first.
    """
    (branch,) = linear.branches
    state = _state(branch, core)
    sizes = branch.sizes()
    modes = tuple((label, sizes[label]) for label in state)
    head = Branch(branch.in_modes, modes, (branch.cores[core],))
    rest = tuple(other for index, other in enumerate(branch.cores) if index != core)
    tail = Branch(modes, branch.out_modes, rest, branch.scale)
    return (
        FactorizedLinear(name, head.in_size, head.out_size, (head,), None, linear.method),
        replace(linear, in_features=tail.in_size, branches=(tail,)),
    )


@dataclass(frozen=True)
class _Found:
    """A way to share: its ``score`` (time), the numbers its forms hold, and what a `Sharing` says."""

    score: float = 0.0
    elements: int = 0
    networks: Mapping[str, FactorizedLinear] = field(default_factory=dict)
    reads: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Search:
    """Over all ways to share among some linears, one common step at a time.

    ``weights``: rows -> what a second is worth there; ``growth``: see Objective.
    """

    weights: tuple[tuple[int, float], ...]
    growth: float
    device: Device | Gpu

    @classmethod
    def over(cls, linears: Mapping[str, FactorizedLinear], objective: Objective, device: Device | Gpu) -> _Search:
        """Times are relative to those of the dense products, as in the choice of forms."""
        if not any(True for _ in _first_steps(linears)):
            return cls((), 0.0, device)
        dense = [forms_of(linear)[-1] for linear in linears.values()]
        totals = {rows: sum(seconds(form, rows, device) for form in dense) for rows in objective.weights}
        weights = tuple((rows, weight / totals[rows]) for rows, weight in objective.weights.items())
        return cls(weights, objective.growth, device)

    def best(self, linears: Mapping[str, FactorizedLinear]) -> _Found:
        """The fastest way within the limit on what is held, else the one that holds least beyond it."""
        common_steps = list(_first_steps(linears))
        if not self.weights:
            return _Found(networks=linears)
        limit, dense = self._limit(linears.values())

        def worth(found: _Found) -> tuple[float, float]:
            return max(0.0, found.elements - limit), found.score

        best = self._apart(linears, limit / dense)
        for common in common_steps:
            name = _name(linears, common)
            parts = {member: split(linears[member], core, name) for member, core in common.items()}
            head, _ = next(iter(parts.values()))
            first = self._apart({name: head}, 1.0)
            tails = self.best({member: tail for member, (_, tail) in parts.items()})
            others = self.best({member: linear for member, linear in linears.items() if member not in common})
            found = _Found(
                first.score + tails.score + others.score,
                first.elements + tails.elements + others.elements,
                {**others.networks, **first.networks, **tails.networks},
                {**others.reads, **dict.fromkeys(tails.networks, name), **tails.reads},
            )
            best = min(best, found, key=worth)
        return best

    def _limit(self, linears: Iterable[FactorizedLinear]) -> tuple[float, int]:
        """Numbers that ``linears`` may hold together, and those of their matrices."""
        every = list(linears)
        stored = sum({core.name: core.size for linear in every for core in linear.core_tensors()}.values())
        dense = sum(linear.in_features * linear.out_features for linear in every)
        return max(stored, stored + self.growth * (dense - stored)), max(1, dense)

    def _apart(self, linears: Mapping[str, FactorizedLinear], share: float) -> _Found:
        """Nothing shared, each in its fastest form that holds at most ``share`` of its matrix."""
        forms = [_fastest(structure(linear), self.weights, share, self.device) for linear in linears.values()]
        return _Found(sum(score for score, _ in forms), sum(size for _, size in forms), linears)


@lru_cache(maxsize=4096)
def _fastest(
    linear: FactorizedLinear, weights: tuple[tuple[int, float], ...], share: float, device: Device | Gpu
) -> tuple[float, int]:
    """Time and numbers of the fastest form that holds at most ``share`` of the matrix, or of the smallest forms."""
    forms = forms_of(linear)
    limit = max(share * forms[-1].elements, min(form.elements for form in forms))
    return min(
        (sum(weight * seconds(form, rows, device) for rows, weight in weights), form.elements)
        for form in forms
        if form.elements <= limit
    )


def _first_steps(linears: Mapping[str, FactorizedLinear]) -> Iterator[dict[str, int]]:
    """Sets of linears that can begin with the same step: name -> number of the core. No set is part of another's."""
    found: dict[object, dict[str, int]] = {}
    uses = Counter(tensor.name for linear in linears.values() for tensor in linear.core_tensors())
    for name, linear in linears.items():
        if len(linear.branches) != 1 or linear.sparse is not None:
            continue
        (branch,) = linear.branches
        inputs = {label for label, _ in branch.in_modes}
        if branch.padded or len(branch.cores) < 2:
            continue
        for index, core in enumerate(branch.cores):
            if uses[core.tensor.name] > 1 and inputs & set(core.labels):
                found.setdefault(_signature(branch, index), {}).setdefault(name, index)
    yield from (members for members in found.values() if len(members) > 1)


def _signature(branch: Branch, core: int) -> object:
    """What the step with ``core`` computes, labels called after their places: equal for equal steps."""
    place: dict[str, object] = {label: ("x", number) for number, (label, _) in enumerate(branch.in_modes)}
    tensor, labels = branch.cores[core].tensor, branch.cores[core].labels
    for axis, label in enumerate(labels):
        place.setdefault(label, ("core", axis))
    sizes = tuple(size for _, size in branch.in_modes)
    return sizes, tensor.name, tuple(map(place.get, labels)), tuple(map(place.get, _state(branch, core)))


def _state(branch: Branch, core: int) -> tuple[str, ...]:
    """Labels of the activation after the step with ``core``."""
    order = (core, *(index for index in range(len(branch.cores)) if index != core))
    return steps(branch, order)[0][1]


def _name(linears: Mapping[str, FactorizedLinear], common: Mapping[str, int]) -> str:
    """``<module>.q_proj+k_proj+v_proj.u1``: who shares it, and the last part of the core's name."""
    first = next(iter(common))
    module = first.rpartition(".")[0]
    stems = [name.rpartition(".")[2] for name in common]
    who = "+".join(stems) if len(stems) <= _NAMED else f"{stems[0]}+{len(stems) - 1}"
    tensor = linears[first].branches[0].cores[common[first]].tensor.name
    return f"{module}.{who}.{tensor.rpartition('.')[2]}".removeprefix(".")
