"""Tensor trains of a matrix in float64: TT-SVD (Oseledets 2011, algorithm 1), ranks for a budget, gauges.

W (out, in) is seen as a tensor with one axis (o_k, i_k) per site; cores (r_{k-1}, o_k, i_k, r_k), r_0 = r_D = 1.
With two cores TT-SVD is the truncated SVD of the rearranged matrix and optimal (Eckart and Young 1936; Van Loan and
Pitsianis 1993); with D cores its error is at most sqrt(D - 1) times that of the best train of its ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch

from mixt_export.compression.tensor_train.modes import Modes, largest_ranks, parameters
from mixt_export.errors import CheckpointError

#: Halvings of the interval that the squared singular values are cut at.
_BISECTIONS = 60
#: Rounds of balancing neighbours; each removes most of what is left.
_BALANCING = 8


def interleaved(matrix: torch.Tensor, modes: Modes) -> torch.Tensor:
    """(out, in) -> (o_1, i_1, o_2, i_2, …), a view where it can be."""
    inputs, outputs = modes
    sites = len(inputs)
    order = [axis for site in range(sites) for axis in (site, sites + site)]
    return matrix.reshape(*outputs, *inputs).permute(order)


def deinterleaved(tensor: torch.Tensor, modes: Modes) -> torch.Tensor:
    """(o_1, i_1, o_2, i_2, …), in any grouping of neighbours, -> (out, in)."""
    inputs, outputs = modes
    sizes = [size for pair in zip(outputs, inputs, strict=True) for size in pair]
    order = [*range(0, len(sizes), 2), *range(1, len(sizes), 2)]
    return tensor.reshape(sizes).permute(order).reshape(prod(outputs), prod(inputs))


def assembled(cores: Sequence[torch.Tensor], modes: Modes) -> torch.Tensor:
    """The matrix (out, in) of ``cores``."""
    found = torch.ones(1, 1, dtype=cores[0].dtype)
    for core in cores:
        found = (found @ core.reshape(core.shape[0], -1)).reshape(-1, core.shape[-1])
    return deinterleaved(found, modes)


def tt_svd(matrix: torch.Tensor, modes: Modes, ranks: Sequence[int]) -> list[torch.Tensor]:
    """Cores of ``matrix`` (out, in) with bonds of at most ``ranks``, left-orthogonal, float64.

    A bond is smaller than asked where its unfolding has fewer rows or columns. Raises CheckpointError when the matrix
    is not finite.
    """
    if not bool(torch.isfinite(matrix).all()):
        raise CheckpointError("the weights or the calibration statistics are not finite.")
    rest = interleaved(matrix.double(), modes).reshape(1, -1)
    cores = []
    for site, (inside, outside) in enumerate(zip(*modes, strict=True)):
        left = rest.shape[0]
        if site == len(ranks):
            cores.append(rest.reshape(left, outside, inside, 1))
            break
        u, values, vt = torch.linalg.svd(rest.reshape(left * outside * inside, -1), full_matrices=False)
        rank = min(ranks[site], len(values))
        cores.append(u[:, :rank].reshape(left, outside, inside, rank))
        rest = values[:rank, None] * vt[:rank]
    return cores


def spectra(matrix: torch.Tensor, modes: Modes) -> list[torch.Tensor]:
    """Squared singular values of the unfolding at every bond, descending, float64."""
    tensor = interleaved(matrix.double(), modes)
    found = []
    for bond in range(1, len(modes[0])):
        unfolding = tensor.reshape(prod(tensor.shape[: 2 * bond]), -1)
        found.append(torch.linalg.svdvals(unfolding).square())
    return found


def ranks_within(values: Sequence[torch.Tensor], modes: Modes, budget: int) -> tuple[int, ...]:
    """Bonds whose cores have at most ``budget`` numbers, all at least 1, by the ``values`` of `spectra`.

    All unfoldings are cut at one singular value, found by bisection (the truncation error is at most the sum of what
    is cut off), then what whole ranks leave is spent bond by bond on the largest values that fit.
    """
    most = largest_ranks(modes)

    def cut(level: float) -> tuple[int, ...]:
        wanted = [int((value > level).sum()) for value in values]
        return _feasible([min(max(1, rank), limit) for rank, limit in zip(wanted, most, strict=True)], modes)

    low, high = 0.0, max(float(value[0]) for value in values) + 1e-300
    if parameters(modes, cut(low)) <= budget:
        return cut(low)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if parameters(modes, cut(middle)) <= budget else (middle, high)
    ranks = list(cut(high))
    while True:
        steps = []
        for bond, value in enumerate(values):
            raised = [*ranks[:bond], ranks[bond] + 1, *ranks[bond + 1 :]]
            fits = parameters(modes, raised) <= budget and _feasible(raised, modes) == tuple(raised)
            if ranks[bond] < most[bond] and fits:
                steps.append((float(value[ranks[bond]]) if ranks[bond] < len(value) else 0.0, bond))
        if not steps:
            return tuple(ranks)
        ranks[max(steps)[1]] += 1


def balanced_gauge(cores: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The same matrix with equal norms on both sides of every index of every bond, so that no core leaves a dtype."""
    found = list(cores)
    for _ in range(_BALANCING):
        for bond in range(len(found) - 1):
            left, right = found[bond], found[bond + 1]
            above, below = left.flatten(0, 2).norm(dim=0), right.flatten(1).norm(dim=1)
            usable = (above > 0) & (below > 0)
            scale = torch.where(usable, (below / above.clamp_min(1e-300)).sqrt(), torch.ones_like(above))
            found[bond], found[bond + 1] = left * scale, right / scale[:, None, None, None]
    return found


def _feasible(ranks: Sequence[int], modes: Modes) -> tuple[int, ...]:
    """``ranks`` lowered until none exceeds what a neighbour and the core between them can carry."""
    sizes = [inside * outside for inside, outside in zip(*modes, strict=True)]
    found = [1, *ranks, 1]
    for site, size in enumerate(sizes[:-1]):
        found[site + 1] = min(found[site + 1], found[site] * size)
    for site in range(len(sizes) - 1, 0, -1):
        found[site] = min(found[site], found[site + 1] * sizes[site])
    return tuple(found[1:-1])
