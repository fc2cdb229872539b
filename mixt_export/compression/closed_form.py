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

from mixt_export.compression.roots import ROOTS, Triangular, cholesky
from mixt_export.errors import CheckpointError


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
    """``gram`` + damping · mean(diag) · I in float64; the identity when ``gram`` is zero (an input never excited).

    ``gram``: (in, in), or (in,) where it is diagonal.
    """
    gram = gram.double()
    diagonal = gram if gram.ndim == 1 else gram.diagonal()
    level = float(diagonal.mean())
    shift = torch.full_like(diagonal, 1.0 if level <= 0.0 else damping * level)
    return gram + shift if gram.ndim == 1 else gram + torch.diag(shift)


def activation_metric(magnitude: torch.Tensor, alpha: float, damping: float) -> torch.Tensor:
    """(in,) diagonal of S = diag(mean|x_j|^alpha)², damped: ASVD, arXiv 2312.05821, equation 6.

    ``magnitude`` (in,): mean |x_j|.
    """
    return damped(magnitude.double() ** (2 * alpha), damping)


def anchored_target(weight: torch.Tensor, drift: torch.Tensor, gram: torch.Tensor, damping: float) -> torch.Tensor:
    """T = argmin ||W A - T B||² + ridge ||W - T||² = W + W D (S + ridge I)⁻¹, ridge = damping · mean diag S.

    ``weight`` (out, in); ``drift`` D = C - S = mean (A - B) Bᵀ, ``gram`` S = mean B Bᵀ (in, in). D is taken from the
    differences themselves: as C - S of two float32 moments it would be their rounding wherever A and B are close, and
    the inverse multiplies that. The ridge pulls towards W, not towards zero: where the tokens say nothing the layer
    stays what it was. Returns (out, in) float64.
    """
    return _corrected(weight, weight.double() @ drift.double(), gram, damping)


def regressed(weight: torch.Tensor, outputs: torch.Tensor, gram: torch.Tensor, damping: float) -> torch.Tensor:
    """T = argmin mean ||y - T b||² + ridge ||W - T||², ridge = damping · mean diag S.

    As ``anchored_target``, from ``outputs`` = mean y Bᵀ (out, in) of the wanted outputs y. Returns (out, in) float64.
    """
    return _corrected(weight, outputs.double() - weight.double() @ gram.double(), gram, damping)


def _corrected(weight: torch.Tensor, residual: torch.Tensor, gram: torch.Tensor, damping: float) -> torch.Tensor:
    """W + R (S + ridge I)⁻¹ of ``residual`` R = mean (y - W b) bᵀ (out, in)."""
    level = float(gram.diagonal().mean())
    if level <= 0.0:
        return weight.double()
    lower = cholesky(damped(gram, damping))
    # T S = R, solved from the right: Sᵀ Tᵀ = Rᵀ
    correction: torch.Tensor = torch.cholesky_solve(residual.T, lower)
    return weight.double() + correction.T


def decompose(
    target: torch.Tensor,
    gram: torch.Tensor | None,
    metric: torch.Tensor | None,
    max_rank: int,
    *,
    root: str = "cholesky",
    output_gram: torch.Tensor | None = None,
) -> Decomposition:
    """Decompose ``target`` (out, in) under the input Gram S (in, in) and the output metric F (out, out).

    ``gram`` None means S = I, (in,) means S = diag(gram); ``metric`` None means F = I; both are taken as given (damp
    them first). ``root``: which of ROOTS takes the square root of S. ``output_gram`` (in, in): what ``error`` is
    measured by, S when None. Factors are returned for ``max_rank`` directions, balanced: row i of ``down`` and column i
    of ``up`` have the same norm, so that neither overflows in half precision.
    """
    target = target.double()
    out_features, in_features = target.shape
    keep = max_rank if output_gram is None else min(out_features, in_features)
    outer = None if metric is None else Triangular(metric)
    whitened = target if outer is None else outer.lower.T @ target  # Gᵀ T
    if out_features <= in_features:
        loss, basis = _eigen_descending(_metric_times(whitened, gram) @ whitened.T)
        images = basis if outer is None else outer.solve_transposed(basis)  # G⁻ᵀ u_i: what i adds to the output
        error = loss * images.square().sum(0)
        up, down = images[:, :keep], basis[:, :keep].T @ whitened
    else:
        inner = None if gram is None else ROOTS[root](gram)
        both = whitened if inner is None else inner.times(whitened)  # M = Gᵀ T R
        loss, basis = _eigen_descending(both.T @ both)
        images = (target if inner is None else inner.times(target)) @ basis  # T R v_i
        error = images.square().sum(0)
        up = images[:, :keep]
        down = (basis[:, :keep] if inner is None else inner.solve_transposed(basis[:, :keep])).T
    if output_gram is not None:
        error = _output_errors(up, down, output_gram)
    return Decomposition(loss, error, *_balanced(up[:, :max_rank], down[:max_rank]))


def updated(
    target: torch.Tensor,
    gram: torch.Tensor,
    metric: torch.Tensor | None,
    up: torch.Tensor,
    down: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One sweep of alternating least squares on tr(F (U V - T) S (U V - T)ᵀ): first U with V fixed, then V with U.

    The sequential update of SVD-LLM (arXiv 2403.07378, section 3.2; its code solves for U alone). ``target`` T (out,
    in), ``gram`` S (in, in), ``metric`` F (out, out) or None for the identity, ``up`` U (out, k), ``down`` V (k, in).
    Neither half can increase the objective, and none can bring it below that of ``decompose``. Returns U and V float64,
    balanced as there.
    """
    target, gram, down = target.double(), gram.double(), down.double()
    seen = gram @ down.T  # S Vᵀ
    up = target @ seen @ _pseudo_inverse(down @ seen)
    weighed = up.T if metric is None else up.T @ metric.double()
    down = _pseudo_inverse(weighed @ up) @ (weighed @ target)
    return _balanced(up, down)


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


def _metric_times(left: torch.Tensor, gram: torch.Tensor | None) -> torch.Tensor:
    """``left`` (n, in) times S: (in, in), the diagonal (in,), or None for the identity."""
    if gram is None:
        return left
    return left * gram.double() if gram.ndim == 1 else left @ gram.double()


def _pseudo_inverse(symmetric: torch.Tensor) -> torch.Tensor:
    """Of a positive semi-definite matrix (k, k); directions of a factor that are zero stay zero."""
    inverse: torch.Tensor = torch.linalg.pinv(symmetric, hermitian=True)
    return inverse


def _output_errors(up: torch.Tensor, down: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """(r,) e with e[k:].sum() = tr(D S Dᵀ), D = ``up[:, k:] @ down[k:]``, of directions not orthogonal under S."""
    products = (up.T @ up) * (down @ gram.double() @ down.T)
    return products.diagonal() + 2 * products.triu(1).sum(1)


def _balanced(up: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Give column i of ``up`` and row i of ``down`` the same norm (the gauge is free)."""
    up_norm, down_norm = up.norm(dim=0), down.norm(dim=1)
    usable = (up_norm > 0) & (down_norm > 0)
    scale = torch.where(usable, (down_norm / up_norm.clamp_min(1e-300)).sqrt(), torch.ones_like(up_norm))
    return up * scale, down / scale[:, None]
