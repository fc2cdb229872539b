"""Partial Tucker decomposition in float64: truncated HOSVD, improved by HOOI (De Lathauwer et al. 2000).

    T ≈ G ×1 U1 ×2 U2 … over the first modes of T, each U_k (n_k, R_k) with orthonormal columns. Later axes of T are
    kept whole: a stack of tensors then shares its factors and has a core each.

With orthonormal factors the best core is T ×1 U1ᵀ ×2 U2ᵀ …, and ||T - G ×1 U1 …||² = ||T||² - ||G||², so that every
quantity here follows from norms of cores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mixt_export.errors import CheckpointError


@dataclass(frozen=True)
class Tucker:
    """``factors``: U_k (n_k, R_k) float64; ``core``: G (R_1, …, later axes) float64.

    ``errors``: relative squared error ||T - T'||² / ||T||² of the start and after every sweep; never increasing.
    """

    factors: tuple[torch.Tensor, ...]
    core: torch.Tensor
    errors: tuple[float, ...]

    @property
    def error(self) -> float:
        """||T - T'||² / ||T||² of the result, 0 for T = 0."""
        return self.errors[-1]


@dataclass(frozen=True)
class Bases:
    """All left singular vectors of every unfolding of a tensor, and the tensor in these bases (the HOSVD)."""

    factors: tuple[torch.Tensor, ...]
    core: torch.Tensor

    def captured(self) -> torch.Tensor:
        """||G||² of the truncated HOSVD for all ranks: element (R_1 - 1, R_2 - 1, …), float64."""
        modes = len(self.factors)
        energy = self.core.square()
        energy = energy.sum(dim=tuple(range(modes, energy.ndim))) if energy.ndim > modes else energy
        for mode in range(modes):
            energy = energy.cumsum(mode)
        return energy

    def truncated(self, ranks: Sequence[int]) -> tuple[torch.Tensor, ...]:
        """The first ``ranks`` columns of each factor."""
        return tuple(factor[:, :rank] for factor, rank in zip(self.factors, ranks, strict=True))


def hosvd(tensor: torch.Tensor, modes: int) -> Bases:
    """Bases of the first ``modes`` axes of ``tensor`` by singular values, descending.

    Raises CheckpointError when a value is not finite.
    """
    if not bool(torch.isfinite(tensor).all()):
        raise CheckpointError("the weights hold NaN or infinity; download the model again.")
    wide = tensor.double()
    factors = tuple(_leading(_unfold(wide, mode), wide.shape[mode]) for mode in range(modes))
    return Bases(factors, _project(wide, factors))


def hooi(tensor: torch.Tensor, start: Sequence[torch.Tensor], *, tolerance: float = 1e-7, sweeps: int = 50) -> Tucker:
    """Higher-order orthogonal iteration from ``start``, factors (n_k, R_k) of the first axes of ``tensor``.

    One sweep replaces each factor by the leading left singular vectors of T projected on the others, the best choice
    while these stay: the error never grows. Ends after ``sweeps``, or when a sweep gains less than ``tolerance`` of
    ||T||². R_k at most the product of the other ranks and later axes (see ``most``).
    """
    wide = tensor.double()
    total = float(wide.square().sum())
    factors = list(start)
    core = _project(wide, factors)
    errors = [_error(core, total)]
    for _ in range(sweeps):
        for mode in range(len(factors)):
            others = [None if other == mode else factor for other, factor in enumerate(factors)]
            rest = _project(wide, others)
            factors[mode] = _leading(_unfold(rest, mode), factors[mode].shape[1])
        core = torch.movedim(torch.tensordot(rest, factors[-1], dims=([len(factors) - 1], [0])), -1, len(factors) - 1)
        errors.append(min(errors[-1], _error(core, total)))
        if errors[-2] - errors[-1] <= tolerance:
            break
    return Tucker(tuple(factors), core, tuple(errors))


def rebuilt(result: Tucker) -> torch.Tensor:
    """T' = G ×1 U1 ×2 U2 …, float64."""
    return _project(result.core, [factor.T for factor in result.factors])


def most(sizes: Sequence[int], ranks: Sequence[int], copies: int) -> list[int]:
    """The largest useful R_k beside the other ``ranks``: min(n_k, Π of the other ranks · ``copies``)."""
    found = []
    for mode, size in enumerate(sizes):
        others = copies
        for other, rank in enumerate(ranks):
            others *= rank if other != mode else 1
        found.append(min(size, others))
    return found


def _error(core: torch.Tensor, total: float) -> float:
    return max(0.0, 1.0 - float(core.square().sum()) / total) if total > 0 else 0.0


def _project(tensor: torch.Tensor, factors: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """``tensor`` ×k U_kᵀ for every factor U_k (n_k, R_k) that is not None."""
    for mode, factor in enumerate(factors):
        if factor is not None:
            tensor = torch.movedim(torch.tensordot(tensor, factor, dims=([mode], [0])), -1, mode)
    return tensor


def _unfold(tensor: torch.Tensor, mode: int) -> torch.Tensor:
    return tensor.movedim(mode, 0).reshape(tensor.shape[mode], -1)


def _leading(matrix: torch.Tensor, count: int) -> torch.Tensor:
    """``count`` left singular vectors of ``matrix`` (rows, columns) with the largest singular values, orthonormal.

    From the eigenvectors of the smaller Gram matrix; squaring is harmless in float64, where what counts lies far above
    1e-8 of the largest singular value. Beyond the number of columns any orthonormal completion serves.
    """
    rows, columns = matrix.shape
    if rows <= columns:
        vectors: torch.Tensor = torch.linalg.eigh(matrix @ matrix.T).eigenvectors
        return vectors.flip(1)[:, :count]
    right = torch.linalg.eigh(matrix.T @ matrix).eigenvectors.flip(1)
    spanned = matrix @ right
    if count > columns:
        spanned = torch.cat([spanned, torch.eye(rows, dtype=matrix.dtype)], dim=1)
    basis: torch.Tensor = torch.linalg.qr(spanned).Q
    return basis[:, :count]
