"""Factors that all experts of a layer share: multiplied once per token instead of once per chosen expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mixt_export.network import FactorizedLinear, TensorRef

Chain = tuple[TensorRef, ...]


@dataclass(frozen=True)
class SharedFactors:
    """One kind of linear (gate, up or down) of all experts: y = x · head · middle_e · tail.

    ``head`` (in, r) and ``tail`` (s, out) are the same tensors for all experts, or None; ``middles`` are the matrices
    of each expert that lie between, at least one.
    """

    head: TensorRef | None
    tail: TensorRef | None
    middles: tuple[Chain, ...]


def chain_of(linear: FactorizedLinear) -> Chain | None:
    """The matrices (in, a), (a, b), …, (z, out) whose product ``linear`` is, as stored; None for another structure."""
    if len(linear.branches) != 1 or linear.sparse is not None or linear.bias is not None:
        return None
    (branch,) = linear.branches
    if branch.scale != 1.0 or branch.padded or len(branch.in_modes) != 1 or len(branch.out_modes) != 1:
        return None
    at = branch.in_modes[0][0]
    for core in branch.cores:
        if len(core.labels) != 2 or core.labels[0] != at:
            return None
        at = core.labels[1]
    return tuple(core.tensor for core in branch.cores) if at == branch.out_modes[0][0] else None


def chain_or_none(linear: FactorizedLinear | None) -> Chain | None:
    """`chain_of` of what may be dense."""
    return None if linear is None else chain_of(linear)


def shared_factors(linears: Sequence[FactorizedLinear | None]) -> SharedFactors | None:
    """What the experts share, or None where one is dense or no chain of matrices, or nothing is shared."""
    chains = []
    for linear in linears:
        chain = chain_or_none(linear)
        if chain is None or len(chain) < 2:
            return None
        chains.append(chain)
    if len({len(chain) for chain in chains}) != 1:
        return None
    head = _common(chains, 0)
    tail = _common(chains, -1) if head is None or len(chains[0]) > 2 else None
    if head is None and tail is None:
        return None
    first, last = int(head is not None), len(chains[0]) - int(tail is not None)
    return SharedFactors(head, tail, tuple(chain[first:last] for chain in chains))


def _common(chains: Sequence[Chain], position: int) -> TensorRef | None:
    """The matrix at ``position`` if all chains name the same."""
    names = {chain[position].name for chain in chains}
    return chains[0][position] if len(names) == 1 else None
