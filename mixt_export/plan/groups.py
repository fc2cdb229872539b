"""Which cores of a branch to merge ahead of time, and in which order the groups meet the activation.

A group of connected cores becomes one core: labels that occur in the group alone are summed. What the activation looks
like depends only on which cores it has met, so that the best ways to reach each set of cores are enough: a dynamic
programme over sets, exact up to `_EXACT` cores; beyond, over the prefixes of the cores in their own order, forwards
and backwards, which for chains are all contiguous groups and both directions. "Best" has two sides, numbers held and
multiply-adds: of each set the ways are kept that nothing beats in both.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from math import prod

from mixt_export.network import Branch

Group = tuple[int, ...]
"""Indices of the cores that are merged, ascending."""

Groups = tuple[Group, ...]
"""All cores of a branch in the order in which they meet the activation."""

_EXACT = 6
_FRONT = 12
"""Ways kept per set of cores."""

_Way = tuple[int, int, Groups]
"""Numbers held, multiply-adds per token, groups so far."""


def candidates(branch: Branch, limit: int) -> list[Groups]:
    """Ways to execute ``branch`` in which no merged group holds more than ``limit`` numbers.

    Both simple orders of the stored cores come first, then the ways that no other beats, the smallest first, and
    their groups in other orders where that costs at most half as much again.
    """
    sizes = branch.sizes()
    number = {label: index for index, label in enumerate(sizes)}
    return list(
        _candidates(
            tuple(number[label] for label, _ in branch.in_modes),
            tuple(number[label] for label, _ in branch.out_modes),
            tuple(tuple(number[label] for label in core.labels) for core in branch.cores),
            tuple(sizes.values()),
            limit,
        )
    )


def multiply_adds(branch: Branch, groups: Groups) -> int:
    """Multiply-adds per token of executing ``branch`` in ``groups``."""
    sizes = branch.sizes()
    number = {label: index for index, label in enumerate(sizes)}
    network = _Network(
        tuple(number[label] for label, _ in branch.in_modes),
        tuple(number[label] for label, _ in branch.out_modes),
        tuple(tuple(number[label] for label in core.labels) for core in branch.cores),
        tuple(sizes.values()),
    )
    return network.macs(groups)


@lru_cache(maxsize=4096)
def _candidates(
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
    cores: tuple[tuple[int, ...], ...],
    sizes: tuple[int, ...],
    limit: int,
) -> tuple[Groups, ...]:
    network = _Network(inputs, outputs, cores, sizes)
    forwards: Groups = tuple((index,) for index in range(len(cores)))
    found: list[Groups] = [forwards, forwards[::-1]]
    ways = network.exact(limit) if len(cores) <= _EXACT else network.prefixes(limit)
    best = _front(ways)
    second = _front([way for way in ways if way not in best])  # as good on paper, with other shapes of products
    for _, macs, groups in sorted(best + second):
        found.append(groups)
        ascending = tuple(sorted(groups))
        found += [other for other in (ascending, ascending[::-1]) if 2 * network.macs(other) <= 3 * macs]
    return tuple(dict.fromkeys(found))


class _Network:
    """Labels and sets of cores as bit masks."""

    def __init__(
        self,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        cores: tuple[tuple[int, ...], ...],
        sizes: tuple[int, ...],
    ) -> None:
        self._sizes = sizes
        self._source, self._target = _mask(inputs), _mask(outputs)
        self._cores = [_mask(core) for core in cores]
        self._all = (1 << len(cores)) - 1
        self._known: dict[int, int] = {}
        self._states: dict[int, int] = {}

    def macs(self, groups: Groups) -> int:
        """Multiply-adds per token."""
        met = total = 0
        for group in groups:
            members = _mask(group)
            total += self._cost(met, members)
            met |= members
        return total

    def exact(self, limit: int) -> list[_Way]:
        """Ways over all sets of cores, in groups that are connected."""
        elements = {
            members: self._size(self._merged(members))
            for members in range(1, self._all + 1)
            if members & members - 1 == 0 or self._connected(members)
        }
        usable = {m: size for m, size in elements.items() if size <= limit or m & m - 1 == 0}
        fronts: dict[int, list[_Way]] = {0: [(0, 0, ())]}
        for met in range(self._all + 1):
            for members, size in usable.items():
                if met & members == members and met & ~members in fronts:
                    before = met & ~members
                    self._extend(fronts, before, members, size)
            if met != self._all:
                fronts[met] = _front(fronts.get(met, []))
        return fronts[self._all]

    def prefixes(self, limit: int) -> list[_Way]:
        """Ways over the prefixes of the cores in their order, and in the reverse."""
        count = self._all.bit_length()
        found = []
        for order in (range(count), range(count - 1, -1, -1)):
            steps = [0]
            for index in order:
                steps.append(steps[-1] | 1 << index)
            fronts: dict[int, list[_Way]] = {0: [(0, 0, ())]}
            for end, after in enumerate(steps[1:], 1):
                for before in steps[:end]:
                    members = after & ~before
                    size = self._size(self._merged(members))
                    if size <= limit or members & members - 1 == 0:
                        self._extend(fronts, before, members, size)
                if after != self._all:
                    fronts[after] = _front(fronts.get(after, []))
            found += fronts[self._all]
        return found

    def _extend(self, fronts: dict[int, list[_Way]], before: int, members: int, size: int) -> None:
        cost, group = self._cost(before, members), tuple(_bits(members))
        fronts.setdefault(before | members, []).extend(
            (held + size, macs + cost, (*groups, group)) for held, macs, groups in fronts[before]
        )

    def _cost(self, met: int, members: int) -> int:
        return self._size(self._state(met) | self._merged(members))

    def _state(self, met: int) -> int:
        """Labels of the activation after ``met``: seen so far and still needed."""
        if met not in self._states:
            seen, needed = self._source, self._target
            for index, mask in enumerate(self._cores):
                if met >> index & 1:
                    seen |= mask
                else:
                    needed |= mask
            self._states[met] = seen & needed
        return self._states[met]

    def _merged(self, members: int) -> int:
        """Labels of the tensor that ``members`` make: those that something else has as well."""
        inside, outside = 0, self._source | self._target
        for index, mask in enumerate(self._cores):
            if members >> index & 1:
                inside |= mask
            else:
                outside |= mask
        return inside & outside if members & members - 1 else inside

    def _connected(self, members: int) -> bool:
        indices = list(_bits(members))
        reached, rest = self._cores[indices[0]], indices[1:]
        while rest:
            touching = [index for index in rest if self._cores[index] & reached]
            if not touching:
                return False
            for index in touching:
                reached |= self._cores[index]
            rest = [index for index in rest if index not in touching]
        return True

    def _size(self, mask: int) -> int:
        if mask not in self._known:
            self._known[mask] = prod(self._sizes[label] for label in _bits(mask))
        return self._known[mask]


def _front(ways: list[_Way]) -> list[_Way]:
    """Those that no other beats in numbers held and in multiply-adds; at most `_FRONT`, spread evenly."""
    kept: list[_Way] = []
    for way in sorted(ways):
        if not kept or way[1] < kept[-1][1]:
            kept.append(way)
    if len(kept) <= _FRONT:
        return kept
    return [kept[round(index * (len(kept) - 1) / (_FRONT - 1))] for index in range(_FRONT)]


def _mask(labels: tuple[int, ...]) -> int:
    return sum(1 << label for label in labels)


def _bits(mask: int) -> Iterator[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def group_name(group: Group) -> str:
    """Cores counted from one: ``2``, ``1-3`` for neighbours, ``1&3`` for others."""
    first, last = group[0] + 1, group[-1] + 1
    if len(group) == 1:
        return str(first)
    if all(b - a == 1 for a, b in pairwise(group)):
        return f"{first}-{last}"
    return "&".join(str(index + 1) for index in group)


def name_of(groups: Groups) -> str:
    """``chain``, ``chain:reversed``, ``order:2,1,3`` or ``merged:1-2,3``, in the order of execution."""
    text = ",".join(map(group_name, groups))
    if any(len(group) > 1 for group in groups):
        return f"merged:{text}"
    if list(groups) == sorted(groups):
        return "chain"
    return "chain:reversed" if list(groups) == sorted(groups, reverse=True) else f"order:{text}"
