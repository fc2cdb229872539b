"""Factors of low rank as foreign formats store them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mixt_export.network import Core, FactorizedLinear


def flipped(core: Core) -> Core:
    """``core`` of two axes, stored the other way round under the same name."""
    return replace(core, labels=core.labels[::-1], tensor=replace(core.tensor, shape=core.tensor.shape[::-1]))


def with_flips(linear: FactorizedLinear, flips: Sequence[bool]) -> FactorizedLinear:
    """``linear`` of one branch, those of its cores flipped that ``flips`` names."""
    (branch,) = linear.branches
    cores = [flipped(core) if flip else core for core, flip in zip(branch.cores, flips, strict=True)]
    return replace(linear, branches=(replace(branch, cores=tuple(cores)),))
