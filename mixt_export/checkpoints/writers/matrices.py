"""Networks of two matrices, seen as such: what other tools' formats hold, and how their factors are laid out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mixt_export.checkpoints.checkpoint import Checkpoint
from mixt_export.checkpoints.store import TensorStore
from mixt_export.checkpoints.write import NewTensor
from mixt_export.errors import UnsupportedError
from mixt_export.network import Branch, Core, FactorizedLinear


@dataclass(frozen=True, slots=True)
class TwoFactors:
    """y = scale · up(down(x)) + bias: cores with the labels of in, rank and out in either order."""

    linear: FactorizedLinear
    down: Core
    up: Core
    inner: str
    bond: str
    outer: str
    scale: float

    @property
    def rank(self) -> int:
        """Size of the bond."""
        return dict(self.down.modes())[self.bond]


def two_factors(linear: FactorizedLinear) -> TwoFactors | None:
    """``linear`` as two matrices, or None where it is another network."""
    if len(linear.branches) != 1 or linear.sparse is not None:
        return None
    (branch,) = linear.branches
    chain = _chain(branch)
    return None if chain is None else TwoFactors(linear, *chain, branch.scale)


def _chain(branch: Branch) -> tuple[Core, Core, str, str, str] | None:
    if branch.padded or len(branch.in_modes) != 1 or len(branch.out_modes) != 1 or len(branch.cores) != 2:
        return None
    inner, outer = branch.in_modes[0][0], branch.out_modes[0][0]
    by_end = {end: core for core in branch.cores for end in (inner, outer) if end in core.labels}
    if len(by_end) != 2 or inner == outer or by_end[inner] is by_end[outer]:
        return None
    bonds = set(by_end[inner].labels) & set(by_end[outer].labels)
    if len(bonds) != 1 or any(len(core.labels) != 2 for core in branch.cores):
        return None
    return by_end[inner], by_end[outer], inner, bonds.pop(), outer


def every_two_factors(source: Checkpoint, name: str) -> dict[str, TwoFactors]:
    """All factorised linears of ``source``; UnsupportedError names the first that the format ``name`` cannot hold."""
    found = {}
    for linear in source.factors.values():
        pair = two_factors(linear)
        if pair is None:
            raise UnsupportedError(
                f"{source.path}: the linear {linear.name!r} ({linear.method or 'a network'}) is no product of two "
                f"matrices, which is all that {name} holds; convert it --to mixt."
            )
        found[linear.name] = pair
    if not found:
        raise UnsupportedError(
            f"{source.path}: has no factorised linear, which is all that {name} is for; compress it."
        )
    return found


def stored_as(store: TensorStore, core: Core, labels: tuple[str, str], name: str, scale: float = 1.0) -> NewTensor:
    """The matrix of ``core`` with its axes in the order of ``labels``, called ``name``, in its stored dtype."""
    sizes = dict(core.modes())
    make = _make(store, core.tensor.name, core.labels != labels, scale)
    return NewTensor(name, core.tensor.dtype, (sizes[labels[0]], sizes[labels[1]]), make)


def _make(store: TensorStore, name: str, turned: bool, scale: float) -> Callable[[], np.ndarray[Any, Any]]:
    def make() -> np.ndarray[Any, Any]:
        values = store.read(name)
        if scale != 1.0:
            values = (values.astype(np.float64) * scale).astype(values.dtype)
        return np.ascontiguousarray(values.T) if turned else values

    return make
