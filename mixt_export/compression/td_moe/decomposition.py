"""Tucker decomposition of stacked experts along their two feature axes, by truncated higher-order SVD.

W_e ≈ U_out G_e U_inᵀ with U_in (in, r_in) and U_out (out, r_out) common to all experts: the leading eigenvectors of
Σ_e W_eᵀ W_e and of Σ_e W_e W_eᵀ (De Lathauwer, De Moor & Vandewalle 2000; "preserve" mode of TD-MoE, arXiv:2606.03465:
no factor along the experts). With statistics S = L Lᵀ of the inputs and a metric F = G Gᵀ of the outputs the same is
done to Gᵀ W_e L and undone in the factors, which minimises the error weighed by both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mixt_export.compression.roots import cholesky


@dataclass(frozen=True)
class Spectra:
    """Eigenvalues, descending, and eigenvectors (columns) of both sides, float64; ``whitened``: (experts, out, in).

    Eigenvalues of a side beyond rank r sum to what dropping those directions costs; costs of both sides together bound
    the error of the decomposition. ``inner`` and ``outer`` are L and G, None for the identity.
    """

    in_values: torch.Tensor
    in_vectors: torch.Tensor
    out_values: torch.Tensor
    out_vectors: torch.Tensor
    whitened: Sequence[torch.Tensor]
    inner: torch.Tensor | None
    outer: torch.Tensor | None


@dataclass(frozen=True)
class Factors:
    """``u_in`` (in, r_in), ``cores`` of each expert (r_in, r_out), ``u_out`` (r_out, out), float64, as they are stored.

    ``errors``: of each expert, relative squared error in the metric that was minimised.
    """

    u_in: torch.Tensor
    cores: list[torch.Tensor]
    u_out: torch.Tensor
    errors: list[float]


def spectra(weights: Sequence[torch.Tensor], gram: torch.Tensor | None, metric: torch.Tensor | None) -> Spectra:
    """Both sides' spectra of ``weights``, each (out, in), under S = ``gram`` (in, in) and F = ``metric`` (out, out).

    None stands for the identity; give statistics damped. Products are float32, their sums and the rest float64. Raises
    CheckpointError for statistics that are not finite and positive definite.
    """
    inner = None if gram is None else cholesky(gram)
    outer = None if metric is None else cholesky(metric)
    whitened = [_whiten(weight, inner, outer) for weight in weights]
    out_features, in_features = weights[0].shape
    of_in = torch.zeros(in_features, in_features, dtype=torch.float64)
    of_out = torch.zeros(out_features, out_features, dtype=torch.float64)
    for matrix in whitened:
        of_in += (matrix.T @ matrix).double()
        of_out += (matrix @ matrix.T).double()
    return Spectra(*_descending(of_in), *_descending(of_out), whitened, inner, outer)


def decompose(found: Spectra, r_in: int, r_out: int) -> Factors:
    """Factors of ranks (r_in, r_out). The columns of ``u_in`` and the rows of ``u_out`` have norm 1."""
    left, right = found.out_vectors[:, :r_out], found.in_vectors[:, :r_in]
    cores, errors = [], []
    for matrix in found.whitened:
        core = left.T @ matrix.double() @ right
        energy = float(matrix.double().square().sum())
        errors.append(max(0.0, 1.0 - float(core.square().sum()) / energy) if energy > 0.0 else 0.0)
        cores.append(core.T)
    u_in, u_out = _back(found.inner, right), _back(found.outer, left)
    in_norms, out_norms = u_in.norm(dim=0), u_out.norm(dim=0)
    scaled = [in_norms[:, None] * core * out_norms for core in cores]
    return Factors(u_in / in_norms, scaled, (u_out / out_norms).T, errors)


def _whiten(weight: torch.Tensor, inner: torch.Tensor | None, outer: torch.Tensor | None) -> torch.Tensor:
    """Gᵀ W L, float32."""
    matrix = weight.double()
    matrix = matrix if outer is None else outer.T @ matrix
    return (matrix if inner is None else matrix @ inner).float()


def _back(lower: torch.Tensor | None, basis: torch.Tensor) -> torch.Tensor:
    """lower⁻ᵀ basis."""
    return basis if lower is None else torch.linalg.solve_triangular(lower.T, basis, upper=True)


def _descending(symmetric: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values, vectors = torch.linalg.eigh(symmetric)
    return values.flip(0).clamp_min(0.0), vectors.flip(1)
