"""Gauge balancing: scale cores against each other so that cores and intermediates reach equally far. Exact."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixt_export import network
from mixt_export.checkpoints import Checkpoint, Made, TensorStore, overlaid
from mixt_export.errors import MixtError
from mixt_export.network import Core, FactorizedLinear, TensorRef, best_orders
from mixt_export.passes.base import PassResult, run
from mixt_export.passes.equalise import Exponents, equalised, scaled
from mixt_export.passes.gauge import Freedom, components, freedoms, with_states
from mixt_export.progress import SILENT, Progress

Maxima = Mapping[str, NDArray[np.float32]]
"""Largest |value| over tokens of what flows between the cores of linears, by `state_name`; axes: the state's labels."""

#: log2 of what an intermediate's channels should reach when cores reach 1: both in the middle of float16's exponents.
STATE_TARGET = 4.0
#: Largest relative difference of a contraction before and after, float64: general D rounds each entry twice.
_SAME = {True: 1e-13, False: 1e-6}


def balance(
    checkpoint: Checkpoint,
    *,
    maxima: Maxima | None = None,
    whole: bool = True,
    least: float = 0.0,
    progress: Progress = SILENT,
) -> Checkpoint:
    """``checkpoint`` with the cores of every factorised linear balanced; see Balance for the arguments."""
    return run(Balance(maxima or {}, whole, least, progress), checkpoint).checkpoint


@dataclass(frozen=True)
class Balance:
    """The pass. Cores are read one group of linears (that share tensors) at a time and scaled again at every read.

    ``maxima``: of calibration, from passes.maxima; without them by weights alone. ``whole``: D holds powers of two, so
    that float32 results stay the same bit for bit; else any numbers, computed in float64 and rounded to the cores'
    dtype once. ``least``: leave a group alone unless some slice moves by 2^``least`` or more. Cores in 16 bits become
    float32, which holds every scaled value. Scales of branches that are powers of two (any, when not ``whole``) move
    into a core that only that branch uses, where every branch of the linear has one.
    """

    maxima: Maxima = field(default_factory=dict)
    whole: bool = True
    least: float = 0.0
    progress: Progress = SILENT
    name: str = "balance"

    def requires(self, checkpoint: Checkpoint) -> None:
        """Nothing: a checkpoint without factors stays as it is."""

    def call(self, checkpoint: Checkpoint) -> PassResult:
        """Lay scaled cores over ``checkpoint``. Raises CheckpointError when a core cannot be read."""
        groups = components(checkpoint.factors.values())
        tensors: dict[str, Made] = {}
        factors: dict[str, FactorizedLinear] = {}
        spans: dict[str, float] = {}
        with self.progress.task("balancing cores", len(groups)) as advance:
            for group in groups:
                folds = self._folds(group)
                exponents = self._exponents(checkpoint, group, folds)
                span = max((float(np.abs(p).max()) for e in exponents.values() for p in e.values()), default=0.0)
                if (exponents and span >= self.least) or folds:
                    changed = _relinked(group, exponents, folds)
                    factors.update(changed)
                    tensors.update(_made(checkpoint.store, changed.values(), exponents))
                    spans.update(dict.fromkeys((linear.name for linear in group), span))
                advance(1)
        if not factors:
            return PassResult(checkpoint, False)
        record = {
            "driven_by": "calibration" if self.maxima else "weights",
            "powers_of_two": self.whole,
            "linears": len(factors),
            "largest_power": round(max(spans.values(), default=0.0), 3),
        }
        return PassResult(overlaid(checkpoint, tensors, factors), True, record)

    def ensures(self, checkpoint: Checkpoint, result: PassResult) -> None:
        """Every balanced linear maps a random input to the same output as before, in float64."""
        rng = np.random.default_rng(0)
        for name, before in checkpoint.factors.items():
            after = result.checkpoint.factors[name]
            if after == before:
                continue
            x = rng.standard_normal((1, before.in_features))
            old = network.apply(before, checkpoint.store.read, x)
            new = network.apply(after, result.checkpoint.store.read, x)
            if not float(np.abs(new - old).max()) <= _SAME[self.whole] * float(np.abs(old).max()):
                raise MixtError(f"Linear {name!r}: balancing changed what it computes. Please report this.")

    def _exponents(
        self, checkpoint: Checkpoint, group: list[FactorizedLinear], folds: Mapping[str, float]
    ) -> dict[str, Exponents]:
        """Exponents of the cores of ``group``; the scale that moves into a core is one of them."""
        free = freedoms(group)
        tensors = {core.name: _wide(checkpoint.store, core.name) for linear in group for core in linear.core_tensors()}
        for name, power in folds.items():
            tensors[name] = np.asarray(tensors[name] * 2.0**power, tensors[name].dtype)
        targets: dict[str, float] = {}
        if self.maxima:
            for linear in group:
                free = self._watched(linear, free, tensors, targets)
        found = equalised(free, tensors, targets, whole=self.whole)
        found = {name: exponents for name, exponents in found.items() if name not in targets}
        for name, power in folds.items():
            known = found.setdefault(name, {})
            known[()] = known.get((), np.zeros(())) + power
        return found

    def _watched(
        self,
        linear: FactorizedLinear,
        free: list[Freedom],
        tensors: dict[str, NDArray[Any]],
        targets: dict[str, float],
    ) -> list[Freedom]:
        """``free`` with the intermediates of ``linear``, whose maxima join ``tensors`` and ``targets``."""
        for number, (branch, order) in enumerate(zip(linear.branches, best_orders(linear), strict=True)):
            names = [state_name(linear.name, number, step) for step in range(len(order))]
            if any(name not in self.maxima for name in names):
                continue
            own = {core.tensor.name for core in branch.cores}
            free = [
                with_states(freedom, branch, order, names)
                if any(name in own for name, _ in freedom.powers)
                else freedom
                for freedom in free
            ]
            tensors.update({name: np.array(self.maxima[name], np.float64) for name in names})
            targets.update(dict.fromkeys(names, STATE_TARGET))
        return free

    def _folds(self, group: list[FactorizedLinear]) -> dict[str, float]:
        """Core -> log2 of the scale of its branch that moves into it."""
        uses = Counter(core.tensor.name for linear in group for branch in linear.branches for core in branch.cores)
        found: dict[str, float] = {}
        for linear in group:
            if all(branch.scale == 1.0 for branch in linear.branches):
                continue
            own = {}
            for branch in linear.branches:
                core = next((core.tensor.name for core in branch.cores if uses[core.tensor.name] == 1), None)
                power = math.log2(branch.scale) if branch.scale > 0.0 else math.nan
                if core is not None and (power.is_integer() or (not self.whole and math.isfinite(power))):
                    own[core] = power
            if len(own) == len(linear.branches):
                found.update(own)
        return found


def state_name(linear: str, branch: int, step: int) -> str:
    """What the activation of ``linear`` after ``step`` of a branch's best order is called in Maxima."""
    return f"{linear}#{branch}#{step}"


def _wide(store: TensorStore, name: str) -> NDArray[Any]:
    """A core in float32, or in float64 where it is stored so: room for its values times powers of two."""
    return store.read(name, "float64" if store.find(name).ref.dtype == "float64" else "float32")


def _relinked(
    group: list[FactorizedLinear], exponents: Mapping[str, Exponents], folds: Mapping[str, float]
) -> dict[str, FactorizedLinear]:
    """The linears of ``group`` with scaled cores in a dtype that holds them, and without the scales that moved."""

    def linked(core: Core) -> Core:
        ref = core.tensor
        dtype = ref.dtype if ref.dtype == "float64" or ref.name not in exponents else "float32"
        return replace(core, tensor=TensorRef(ref.name, ref.shape, dtype))

    result = {}
    for linear in group:
        branches = []
        for branch in linear.branches:
            moved = any(core.tensor.name in folds for core in branch.cores)
            scale = 1.0 if moved else branch.scale
            branches.append(replace(branch, cores=tuple(map(linked, branch.cores)), scale=scale))
        result[linear.name] = replace(linear, branches=tuple(branches))
    return result


def _made(store: TensorStore, linears: Any, exponents: Mapping[str, Exponents]) -> dict[str, Made]:
    refs = {core.name: core for linear in linears for core in linear.core_tensors() if core.name in exponents}
    return {name: Made(ref.dtype, ref.shape, _late(store, name, exponents[name])) for name, ref in refs.items()}


def _late(store: TensorStore, name: str, exponents: Exponents) -> Callable[[], NDArray[Any]]:
    return partial(_scaled_read, store, name, exponents)


def _scaled_read(store: TensorStore, name: str, exponents: Exponents) -> NDArray[Any]:
    return scaled(_wide(store, name), exponents)
