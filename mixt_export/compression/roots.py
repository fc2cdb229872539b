"""Square roots of second moments: S = R Rᵀ, float64.

Every root gives the same optimum; they differ in what they survive. A Cholesky factor is the cheapest and needs S to be
positive definite (SVD-LLM, arXiv 2403.07378); the eigendecomposition S = Q Λ Qᵀ, R = Q Λ^½, also serves where S is
singular (SVD-LLM v2, arXiv 2503.12340); a diagonal S needs neither (ASVD, arXiv 2312.05821).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from mixt_export.errors import CheckpointError

#: Cholesky is retried with this much of the mean diagonal added, times ten each time, when rounding made it fail.
_FIRST_JITTER = 1e-12
_LAST_JITTER = 1e-3

#: Eigenvalues below this share of the largest are rounding; their directions are left out of the inverse.
_ROUNDING = 1e-14


class Root(Protocol):
    """R of S = R Rᵀ."""

    def times(self, left: torch.Tensor) -> torch.Tensor:
        """``left`` (n, in) times R."""

    def solve_transposed(self, right: torch.Tensor) -> torch.Tensor:
        """R⁻ᵀ ``right`` (in, n)."""


class Triangular:
    """Cholesky factor of ``gram`` (in, in). Raises CheckpointError as ``cholesky``."""

    def __init__(self, gram: torch.Tensor) -> None:
        self.lower = cholesky(gram)

    def times(self, left: torch.Tensor) -> torch.Tensor:
        """See Root."""
        product: torch.Tensor = left @ self.lower
        return product

    def solve_transposed(self, right: torch.Tensor) -> torch.Tensor:
        """See Root."""
        solved: torch.Tensor = torch.linalg.solve_triangular(self.lower.T, right, upper=True)
        return solved


class Spectral:
    """Q Λ^½ of the eigendecomposition of ``gram`` (in, in); the inverse is the pseudo-inverse.

    Raises CheckpointError when ``gram`` is not finite.
    """

    def __init__(self, gram: torch.Tensor) -> None:
        require_finite(gram)
        values, self.vectors = torch.linalg.eigh(gram.double())
        self.roots = values.clamp_min(0.0).sqrt()
        usable = values > _ROUNDING * values[-1]
        self.inverses = torch.where(usable, 1.0 / self.roots, torch.zeros_like(self.roots))

    def times(self, left: torch.Tensor) -> torch.Tensor:
        """See Root."""
        product: torch.Tensor = (left @ self.vectors) * self.roots
        return product

    def solve_transposed(self, right: torch.Tensor) -> torch.Tensor:
        """See Root."""
        # R⁻ᵀ = Q Λ^-½, which acts on coordinates in the eigenbasis
        product: torch.Tensor = self.vectors @ (self.inverses[:, None] * right)
        return product


class Diagonal:
    """Root of diag(``gram``), ``gram`` (in,) positive."""

    def __init__(self, gram: torch.Tensor) -> None:
        require_finite(gram)
        self.scale = gram.double().sqrt()

    def times(self, left: torch.Tensor) -> torch.Tensor:
        """See Root."""
        return left * self.scale

    def solve_transposed(self, right: torch.Tensor) -> torch.Tensor:
        """See Root."""
        return right / self.scale[:, None]


#: Input metric (method.INPUT_METRICS) -> its root; the identity has none.
ROOTS: dict[str, Callable[[torch.Tensor], Root]] = {
    "cholesky": Triangular,
    "eigen": Spectral,
    "diagonal": Diagonal,
}


def cholesky(matrix: torch.Tensor) -> torch.Tensor:
    """Lower Cholesky factor in float64, adding the least power-of-ten share of the mean diagonal that makes it exist.

    Raises CheckpointError when ``matrix`` is not finite or not positive semi-definite.
    """
    matrix = matrix.double()
    require_finite(matrix)
    factor: torch.Tensor
    factor, failed = torch.linalg.cholesky_ex(matrix)
    jitter = _FIRST_JITTER
    while int(failed) and jitter <= _LAST_JITTER:
        level = jitter * float(matrix.diagonal().mean())
        factor, failed = torch.linalg.cholesky_ex(matrix + level * torch.eye(len(matrix), dtype=torch.float64))
        jitter *= 10.0
    if int(failed):
        values = torch.linalg.eigvalsh(matrix)
        rank = int((values > 1e-12 * values.abs().max()).sum())
        raise CheckpointError(
            f"calibration statistics of {len(matrix)} features are not positive definite: their rank is {rank}; "
            f"calibrate on at least {len(matrix)} tokens, better several times as many."
        )
    return factor


def require_finite(statistics: torch.Tensor, of: str = "") -> None:
    """Raise CheckpointError where ``statistics`` (of linear ``of``) hold NaN or infinity."""
    if not bool(torch.isfinite(statistics).all()):
        raise CheckpointError(
            f"{of}{': ' if of else ''}calibration statistics of {len(statistics)} features are not finite: the model "
            f"overflows on the calibration text; take other text, of at least {len(statistics)} tokens."
        )
