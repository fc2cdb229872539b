"""The best rank-k replacement of one linear under a quadratic loss, in closed form and float64.

With statistics S = mean B Bᵀ and C = mean A Bᵀ of inputs A (what the original linear saw) and B (what the replacement
will see), and an output metric F, every objective is

    min over rank(W') <= k of  tr(F (W' - T) S (W' - T)ᵀ),   T = W C S⁻¹,   T = W when A = B,

solved by the truncated SVD of M = Gᵀ T L with S = L Lᵀ, F = G Gᵀ (Eckart-Young; reduced-rank regression). F = I is
AA-SVD (arXiv 2604.02119, theorem 3.2; A = B is SVD-LLM, arXiv 2403.07378); F = mean g gᵀ of the loss gradient at
the linear's output is generalised Fisher-weighted SVD (arXiv 2505.17974; Kronecker factors: Martens & Grosse 2015).

The replacement is written as a projection of T (left: onto k directions of the output, right: of the input), so at
full rank it is T to rounding whatever the statistics, and only the smaller side needs an eigendecomposition.
Statistics are damped before (``damped``): Grams of a few thousand tokens are singular or nearly so, and a multiple of
the identity is the cheapest regulariser that makes Cholesky factors exist and keeps directions that the calibration
tokens never visited from being thrown away for free.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mixt_export.errors import CheckpointError

#: Cholesky is retried with this much of the mean diagonal added, times ten each time, when rounding made it fail.
_FIRST_JITTER = 1e-12
_LAST_JITTER = 1e-3


@dataclass(frozen=True)
class Decomposition:
    """All ranks of one linear at once, float64 unless said otherwise.

    ``loss``: (r,) squared singular values of M, descending; the objective of rank k is ``loss[k:].sum()`` above
    that of the unconstrained target. ``error``: (r,) what direction i carries of the plain output error
    ``tr((W' - T) S (W' - T)ᵀ)`` when it is left out (the directions are orthogonal in that metric too).
    ``up``: (out, k_max), ``down``: (k_max, in): W' of rank k is ``up[:, :k] @ down[:k]``.
    """

    loss: torch.Tensor
    error: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor


def damped(gram: torch.Tensor, damping: float) -> torch.Tensor:
    """``gram`` + damping · mean(diag) · I in float64; the identity when ``gram`` is zero (an input never excited)."""
    gram = gram.double()
    level = float(gram.diagonal().mean())
    if level <= 0.0:
        return torch.eye(len(gram), dtype=torch.float64)
    return gram + damping * level * torch.eye(len(gram), dtype=torch.float64)


def anchored_target(weight: torch.Tensor, cross: torch.Tensor, gram: torch.Tensor, damping: float) -> torch.Tensor:
    """T = argmin ||W A - T B||² + ridge ||W - T||² = W (C + ridge I)(S + ridge I)⁻¹, ridge = damping · mean diag S.

    ``weight`` (out, in); ``cross`` = mean A Bᵀ, ``gram`` = mean B Bᵀ (in, in). The ridge pulls towards W, not towards
    zero: where the tokens say nothing the layer stays what it was. Returns (out, in) float64.
    """
    return regressed(weight, weight.double() @ cross.double(), gram, damping)


def regressed(weight: torch.Tensor, outputs: torch.Tensor, gram: torch.Tensor, damping: float) -> torch.Tensor:
    """T = argmin mean ||y - T b||² + ridge ||W - T||², ridge = damping · mean diag S.

    As ``anchored_target``, from ``outputs`` = mean y Bᵀ (out, in) of the wanted outputs y. Returns (out, in) float64.
    """
    level = float(gram.diagonal().mean())
    if level <= 0.0:
        return weight.double()
    ridge = damping * level
    lower = cholesky(gram.double() + ridge * torch.eye(len(gram), dtype=torch.float64))
    # T S = Y, solved from the right: Sᵀ Tᵀ = Yᵀ
    solved: torch.Tensor = torch.cholesky_solve((outputs.double() + ridge * weight.double()).T, lower)
    return solved.T


def decompose(
    target: torch.Tensor, gram: torch.Tensor | None, metric: torch.Tensor | None, max_rank: int
) -> Decomposition:
    """Decompose ``target`` (out, in) under the input Gram S (in, in) and the output metric F (out, out).

    ``gram`` None means S = I, ``metric`` None means F = I; both are taken as given (damp them first). Factors are
    returned for ``max_rank`` directions, balanced: row i of ``down`` and column i of ``up`` have the same norm, so that
    neither overflows in half precision.
    """
    target = target.double()
    out_features, in_features = target.shape
    outer = None if metric is None else cholesky(metric)
    whitened = target if outer is None else outer.T @ target  # Gᵀ T
    if out_features <= in_features:
        weighted = whitened if gram is None else whitened @ gram.double()
        loss, basis = _eigen_descending(weighted @ whitened.T)
        images = _solve_transposed(outer, basis)  # G⁻ᵀ u_i: what direction i adds to the output
        error = loss * images.square().sum(0)
        return _balanced(loss, error, images[:, :max_rank], basis[:, :max_rank].T @ whitened)
    inner = None if gram is None else cholesky(gram)
    both = whitened if inner is None else whitened @ inner  # M = Gᵀ T L
    loss, basis = _eigen_descending(both.T @ both)
    images = (target if inner is None else target @ inner) @ basis  # T L v_i
    error = images.square().sum(0)
    return _balanced(loss, error, images[:, :max_rank], _solve_transposed(inner, basis[:, :max_rank]).T)


def cholesky(matrix: torch.Tensor) -> torch.Tensor:
    """Lower Cholesky factor in float64, adding the least power-of-ten share of the mean diagonal that makes it exist.

    Raises CheckpointError when ``matrix`` is not finite or not positive semi-definite.
    """
    matrix = matrix.double()
    if not bool(torch.isfinite(matrix).all()):
        raise CheckpointError("calibration statistics are not finite: the model overflows on the calibration text.")
    factor: torch.Tensor
    factor, failed = torch.linalg.cholesky_ex(matrix)
    jitter = _FIRST_JITTER
    while int(failed) and jitter <= _LAST_JITTER:
        level = jitter * float(matrix.diagonal().mean())
        factor, failed = torch.linalg.cholesky_ex(matrix + level * torch.eye(len(matrix), dtype=torch.float64))
        jitter *= 10.0
    if int(failed):
        raise CheckpointError("calibration statistics are not positive semi-definite; use more calibration tokens.")
    return factor


def quadratic_error(difference: torch.Tensor, gram: torch.Tensor) -> float:
    """tr(D S Dᵀ) in float64 for ``difference`` D (out, in) and ``gram`` S (in, in)."""
    difference = difference.double()
    return float(((difference @ gram.double()) * difference).sum())


def _eigen_descending(symmetric: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues (clipped at zero against rounding) and eigenvectors of ``symmetric``, largest first."""
    if not bool(torch.isfinite(symmetric).all()):
        raise CheckpointError("the weights or the calibration statistics are not finite.")
    values, vectors = torch.linalg.eigh(symmetric)
    return values.flip(0).clamp_min(0.0), vectors.flip(1)


def _solve_transposed(lower: torch.Tensor | None, right: torch.Tensor) -> torch.Tensor:
    """lower⁻ᵀ right; ``right`` itself when ``lower`` is None (the identity)."""
    return right if lower is None else torch.linalg.solve_triangular(lower.T, right, upper=True)


def _balanced(loss: torch.Tensor, error: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> Decomposition:
    """Give column i of ``up`` and row i of ``down`` the same norm (the gauge is free)."""
    up_norm, down_norm = up.norm(dim=0), down.norm(dim=1)
    usable = (up_norm > 0) & (down_norm > 0)
    scale = torch.where(usable, (down_norm / up_norm.clamp_min(1e-300)).sqrt(), torch.ones_like(up_norm))
    return Decomposition(loss, error, up * scale, down / scale[:, None])
