"""Recognise a MixT (Tensor Mixture, arXiv:2605.25344) in the general representation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from mixt_export.network import Branch, FactorizedLinear

Load = Callable[[str], np.ndarray[Any, Any]]


@dataclass(frozen=True, slots=True)
class Term:
    """I_a ⊗ T ⊗ I_c: where the core T lies and how it is stored."""

    tensor: str
    stored_transposed: bool
    """The core is stored as (in, out) instead of (out, in)."""


@dataclass(frozen=True, slots=True)
class Mixture:
    """W = scale · Σ_k I_(d^k) ⊗ T_k ⊗ I_(d^(N-1-k)), k = 0 … N-1, cropped to (out_features, in_features).

    ``terms`` in the order of k; every T_k is ``core_shape`` = (out/S, in/S) of the padded features, S = ``bond``^(N-1).
    """

    name: str
    in_features: int
    out_features: int
    bond: int
    core_shape: tuple[int, int]
    terms: tuple[Term, ...]
    scale: float

    @property
    def spectators(self) -> int:
        """S = d^(N-1): how many copies of itself each T_k stands for."""
        return int(self.bond ** (len(self.terms) - 1))

    @property
    def padded_features(self) -> tuple[int, int]:
        """(out, in) as the products of the modes; larger than the features where the paper's padding is on."""
        rows, columns = self.core_shape
        return rows * self.spectators, columns * self.spectators

    @property
    def stored_elements(self) -> int:
        """Numbers in all cores; a core that several terms share counts once."""
        return prod(self.core_shape) * len({term.tensor for term in self.terms})

    @staticmethod
    def of(linear: FactorizedLinear) -> Mixture | None:
        """The mixture that ``linear`` is, or None when its network is another one (or a single term)."""
        if linear.sparse is not None or len(linear.branches) < 2:
            return None
        views = [_view(branch) for branch in linear.branches]
        found = sorted((view for view in views if view is not None), key=lambda view: view.left)
        if len(found) != len(views):
            return None
        first, last = found[0], found[-1]
        terms, bond = len(found), found[1].left
        expected = [(bond**k, bond ** (terms - 1 - k)) for k in range(terms)]
        if bond < 2 or [(view.left, view.right) for view in found] != expected:
            return None
        if any((view.core_shape, view.scale) != (first.core_shape, first.scale) for view in (*found, last)):
            return None
        return Mixture(
            linear.name,
            linear.in_features,
            linear.out_features,
            bond,
            first.core_shape,
            tuple(view.term for view in found),
            first.scale,
        )


@dataclass(frozen=True, slots=True)
class _View:
    left: int
    right: int
    core_shape: tuple[int, int]
    scale: float
    term: Term


def _view(branch: Branch) -> _View | None:
    """``branch`` as I_left ⊗ T ⊗ I_right with one matrix T, or None."""
    if len(branch.cores) != 1 or len(branch.cores[0].labels) != 2:
        return None
    (core,) = branch.cores
    sizes = dict(core.modes())
    inputs = [label for label, _ in branch.in_modes]
    outputs = [label for label, _ in branch.out_modes]
    read, made = [label for label in inputs if label in sizes], [label for label in outputs if label in sizes]
    if len(read) != 1 or len(made) != 1 or {read[0], made[0]} != set(core.labels):
        return None
    at_in, at_out = inputs.index(read[0]), outputs.index(made[0])
    if (inputs[:at_in], inputs[at_in + 1 :]) != (outputs[:at_out], outputs[at_out + 1 :]):
        return None
    return _View(
        left=prod(size for _, size in branch.in_modes[:at_in]),
        right=prod(size for _, size in branch.in_modes[at_in + 1 :]),
        core_shape=(sizes[made[0]], sizes[read[0]]),
        scale=branch.scale,
        term=Term(core.tensor.name, stored_transposed=core.labels == (read[0], made[0])),
    )
