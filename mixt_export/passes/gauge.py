"""The gauge freedom of factorised linears: diagonal matrices D·D⁻¹ that fit between two cores without a trace.

A network is a sum over products of one entry per core. Dividing the slices of one core along shared labels by numbers
and multiplying the slices of another core along the same labels by them changes no product, whether the labels are
summed (bonds), batch labels (Monarch) or hyperedges (BLAST's rank). Of two tensors that occur once the numbers may
depend on all labels that they share at once: that is D across a reshaped bond. A tensor that several linears or
branches use is scaled for all of them, so that its numbers must cancel in each: such bonds are solved together where
every label joins two cores, and left alone where it joins more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

from mixt_export.network import Branch, Core, FactorizedLinear, Order
from mixt_export.network.order import steps

Site = tuple[str, tuple[int, ...]]
"""A tensor by name and the axes along which it is scaled; no axes: as a whole."""


@dataclass(frozen=True)
class Freedom:
    """Numbers t, an array of ``shape``: tensor ``site[0]`` times 2^(power · t) along ``site[1]``, for every site.

    The networks stay what they are for any t. Powers are 1 and -1.
    """

    shape: tuple[int, ...]
    powers: Mapping[Site, int]


def components(linears: Iterable[FactorizedLinear]) -> list[list[FactorizedLinear]]:
    """``linears`` in groups that share core tensors, directly or through others; each group is solved by itself."""
    groups: list[tuple[set[str], list[FactorizedLinear]]] = []
    for linear in linears:
        names, members = {core.name for core in linear.core_tensors()}, [linear]
        apart = []
        for other, those in groups:
            if other & names:
                names, members = other | names, those + members
            else:
                apart.append((other, those))
        groups = [*apart, (names, members)]
    return [members for _, members in groups]


def freedoms(linears: Iterable[FactorizedLinear]) -> list[Freedom]:
    """Every freedom between the cores of ``linears``, which share tensors with no others."""
    linears = list(linears)
    uses = Counter(core.tensor.name for linear in linears for branch in linear.branches for core in branch.cores)
    found = [freedom for linear in linears for branch in linear.branches for freedom in _pairs(branch, uses)]
    return found + _joint(linears, uses)


def with_states(freedom: Freedom, branch: Branch, order: Order, names: Iterable[str]) -> Freedom:
    """``freedom`` with what it does to the activation after each step of ``order``, whose states are called ``names``.

    A state scales along a label as the cores do together that it has met: after the last one, not at all.
    """
    met: list[Core] = []
    powers = dict(freedom.powers)
    for index, (_, state), name in zip(order, steps(branch, order), names, strict=True):
        met.append(branch.cores[index])
        sums: Counter[tuple[str, ...]] = Counter()
        for core in met:
            for (tensor, axes), power in freedom.powers.items():
                if tensor == core.tensor.name:
                    sums[tuple(core.labels[axis] for axis in axes)] += power
        for along, power in sums.items():
            if power:
                powers[name, tuple(state.index(label) for label in along)] = power
    return Freedom(freedom.shape, powers)


def _pairs(branch: Branch, uses: Mapping[str, int]) -> Iterator[Freedom]:
    """Between any two tensors of ``branch`` that occur nowhere else, over all labels that they share."""
    for one, other in combinations([core for core in branch.cores if uses[core.tensor.name] == 1], 2):
        shared = [label for label in one.labels if label in other.labels]
        places = [tuple(core.labels.index(label) for label in shared) for core in (one, other)]
        shape = tuple(one.tensor.shape[axis] for axis in places[0])
        yield Freedom(shape, {(one.tensor.name, places[0]): 1, (other.tensor.name, places[1]): -1})


def _joint(linears: list[FactorizedLinear], uses: Mapping[str, int]) -> list[Freedom]:
    """Freedoms along single axes of tensors that occur several times: one number per index, the same for all uses."""
    axes = _Axes()
    sizes = {}
    for linear in linears:
        for branch in linear.branches:
            holders: dict[str, list[tuple[str, int]]] = {}
            for core in branch.cores:
                for axis, label in enumerate(core.labels):
                    holders.setdefault(label, []).append((core.tensor.name, axis))
                    sizes[core.tensor.name, axis] = core.tensor.shape[axis]
            for places in holders.values():
                if len(places) == 2:
                    axes.oppose(*places)
                else:
                    axes.fix(places)
    result = []
    for members in axes.classes():
        if any(uses[name] > 1 for name, _ in members):
            first = next(iter(members))
            result.append(Freedom((sizes[first],), {(name, (axis,)): sign for (name, axis), sign in members.items()}))
    return result


class _Axes:
    """Axes of tensors whose exponents are one another's opposites: union-find with signs; what cannot be is fixed."""

    def __init__(self) -> None:
        self._parent: dict[tuple[str, int], tuple[tuple[str, int], int]] = {}
        self._fixed: set[tuple[str, int]] = set()

    def oppose(self, one: tuple[str, int], other: tuple[str, int]) -> None:
        """The exponents of ``one`` and ``other`` cancel."""
        (a, sign_a), (b, sign_b) = self._root(one), self._root(other)
        if a == b:
            if sign_a == sign_b:  # its own opposite
                self._fixed.add(a)
            return
        self._parent[a] = (b, -sign_a * sign_b)
        if a in self._fixed:
            self._fixed.add(b)

    def fix(self, axes: Iterable[tuple[str, int]]) -> None:
        """None of ``axes`` is scaled."""
        for axis in axes:
            self._fixed.add(self._root(axis)[0])

    def classes(self) -> list[dict[tuple[str, int], int]]:
        """Axes that are scaled together, with their signs."""
        found: dict[tuple[str, int], dict[tuple[str, int], int]] = {}
        for axis in list(self._parent):
            root, sign = self._root(axis)
            found.setdefault(root, {})[axis] = sign
        return [members for root, members in found.items() if root not in self._fixed and len(members) > 1]

    def _root(self, axis: tuple[str, int]) -> tuple[tuple[str, int], int]:
        sign = 1
        self._parent.setdefault(axis, (axis, 1))
        while self._parent[axis][0] != axis:
            axis, step = self._parent[axis]
            sign *= step
        return axis, sign
