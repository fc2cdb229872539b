"""The network that a form executes, and how its merged cores are made from the stored ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import opt_einsum

from mixt_export.network import Branch, Core, FactorizedLinear, Mode, TensorRef, densify
from mixt_export.plan.groups import Group, Groups, group_name

Array = np.ndarray[Any, Any]
Load = Callable[[str], Array]


@dataclass(frozen=True)
class Source:
    """A merged core: its stored parts and the labels of the result; ``scale`` is multiplied in.

    Neighbouring ``labels`` may share an axis of ``tensor``: modes that nothing else has are one mode.
    """

    tensor: TensorRef
    parts: tuple[Core, ...]
    labels: tuple[str, ...]
    scale: float

    def make(self, load: Load) -> Array:
        """The merged core in float64; ``load(name)`` gives a stored core in any float dtype."""
        number = {label: index for index, label in enumerate(dict.fromkeys(_labels(self.parts)))}
        operands: list[Any] = []
        for core in self.parts:
            operands += [load(core.tensor.name).astype(np.float64), [number[label] for label in core.labels]]
        made: Array = opt_einsum.contract(*operands, [number[label] for label in self.labels], optimize="auto")
        return self.scale * made.reshape(self.tensor.shape)


@dataclass(frozen=True)
class Merged:
    """``network``: the linear with merged cores, of each branch in the order of execution; ``sources`` by tensor name.

    The network's sparse residual is that of the linear. Tensors that are not in ``sources`` are stored.
    """

    network: FactorizedLinear
    sources: dict[str, Source]


def merge(linear: FactorizedLinear, groups: Sequence[Groups]) -> Merged:
    """``linear`` with the cores of every group merged; ``groups`` holds those of each branch."""
    branches = []
    sources: dict[str, Source] = {}
    for number, (branch, wanted) in enumerate(zip(linear.branches, groups, strict=True)):
        stem = f"{linear.name}.branch{number}" if len(linear.branches) > 1 else linear.name
        modes = _Modes(branch, wanted)
        cores, scale = [], branch.scale
        for group in wanted:
            if len(group) == 1:
                cores.append(branch.cores[group[0]])
                continue
            core, source = _merged(branch, group, f"{stem}.cores{group_name(group)}", scale, modes)
            sources[core.tensor.name] = source
            cores.append(core)
            scale = 1.0
        inputs, outputs = modes.joined(branch.in_modes), modes.joined(branch.out_modes)
        branches.append(replace(branch, in_modes=inputs, out_modes=outputs, cores=tuple(cores), scale=scale))
    return Merged(replace(linear, branches=tuple(branches)), sources)


def dense_weight(linear: FactorizedLinear, load: Load) -> Array:
    """The (in, out) matrix of ``linear`` in float64, sparse residual included."""
    return densify(linear, load).T


class _Modes:
    """Which neighbouring modes of a branch become one: those that a single merged group, and nothing else, has."""

    def __init__(self, branch: Branch, groups: Groups) -> None:
        self.sizes = branch.sizes()
        owners: dict[str, set[object]] = {}
        for group in groups:
            for index in group:
                for label in branch.cores[index].labels:
                    owners.setdefault(label, set()).add(group if len(group) > 1 else index)
        self.runs: dict[str, tuple[str, ...]] = {}
        ends = ([label for label, _ in branch.in_modes], [label for label, _ in branch.out_modes])
        through = set(ends[0]) & set(ends[1])
        for labels in ends:
            owner: object = None
            first = ""
            for label in labels:
                mine = next(iter(owners.get(label, {None})))
                joins = isinstance(mine, tuple) and len(owners[label]) == 1 and label not in through
                if joins and mine == owner:
                    self.runs[first] = (*self.runs[first], label)
                else:
                    self.runs[label], first, owner = (label,), label, mine if joins else None

    def joined(self, modes: tuple[Mode, ...]) -> tuple[Mode, ...]:
        """``modes`` with each run as one mode, called after its first label."""
        return tuple((label, self.size(label)) for label, _ in modes if label in self.runs)

    def size(self, label: str) -> int:
        """Of the mode or bond that is called ``label`` after joining."""
        return prod(self.sizes[part] for part in self.runs.get(label, (label,)))


def _merged(branch: Branch, group: Group, name: str, scale: float, modes: _Modes) -> tuple[Core, Source]:
    parts = tuple(branch.cores[index] for index in group)
    ends = {label for label, _ in (*branch.in_modes, *branch.out_modes)}
    elsewhere = ends | set(_labels(core for index, core in enumerate(branch.cores) if index not in group))
    kept = [label for label in dict.fromkeys(_labels(parts)) if label in elsewhere]
    kept = [label for label in kept if label in modes.runs or label not in ends]
    tensor = TensorRef(name, tuple(modes.size(label) for label in kept), parts[0].tensor.dtype)
    labels = tuple(part for label in kept for part in modes.runs.get(label, (label,)))
    return Core(tensor, tuple(kept)), Source(tensor, parts, labels, scale)


def _labels(cores: Any) -> list[str]:
    return [label for core in cores for label in core.labels]
