"""The best MixT of one linear in closed form: of its weight, or of its outputs given second moments of its inputs.

MixT (arXiv:2605.25344): W' = s Σ_k I_{a_k} ⊗ T_k ⊗ I_{c_k} with a_k = d^(k-1), c_k = d^(N-k), S = a_k c_k = d^(N-1).
In the exact form W' is (out, in); in the paper's form it is larger and cropped at the end of both axes.
The partial trace ptr_k(M) sums the S diagonal copies of T_k's place in M; it is the adjoint of T ↦ I ⊗ T ⊗ I.

Matching: the maps M ↦ I ⊗ ptr_k(M)/S ⊗ I are orthogonal projectors. Where S² divides the features they commute, because
the windows of all k are unions of the same factors of d, and subtracting them one after the other is the global
optimum of ||W - W'||_F in one sweep; elsewhere the sweep is repeated (von Neumann's alternating projections).

Fitting: with C = mean w y xᵀ (wanted outputs y, inputs x, token weights w) and G = mean w x xᵀ, the loss
mean w ||y - W' x||² is convex in all T_k and quadratic in one, hence block descent:

    T_k <- [ptr_k(C - W' G) + T_k ptr_k(G) + λ T_k⁰] (ptr_k(G) + λ I)⁻¹

Everything is float64. Cropped outputs carry no loss and padded inputs no moments, so in the paper's form the traces
run over the copies that reach a real output: at most three different sets of them per branch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mixt_export.compression.roots import cholesky
from mixt_export.errors import CheckpointError

if TYPE_CHECKING:
    from mixt_export.reference.tensor_mixture import MixTShape


#: Matching ends when a sweep gains less than this share of ||W||², or after so many sweeps.
_STILL, _MATCHING_SWEEPS = 1e-28, 1000


def match(weight: torch.Tensor, shape: MixTShape) -> list[torch.Tensor]:
    """Cores T_k (out/S, in/S) float64 that minimise ||W - W'||_F for ``weight`` W (out, in).

    In the paper's form W is padded by zeros to (S · out/S, S · in/S) first, and the padding is matched too.
    """
    rest = _widened(weight.double(), shape)
    height, width = shape.core_shape
    locals_ = [torch.zeros(height, width, dtype=torch.float64) for _ in shape.splits]
    commute = height % shape.spectators == 0 and width % shape.spectators == 0
    least = _STILL * float(rest.square().sum())
    for _ in range(1 if commute else _MATCHING_SWEEPS):
        gained = 0.0
        for local, split in zip(locals_, shape.splits, strict=True):
            step = _trace(rest, split) / shape.spectators
            _copies(rest, split).sub_(step[:, :, None, None])
            local += step
            gained += shape.spectators * float(step.square().sum())
        if gained <= least:
            break
    return [local / shape.scale for local in locals_]


def fit(
    cross: torch.Tensor,
    gram: torch.Tensor,
    shape: MixTShape,
    *,
    ridge: float = 0.0,
    sweeps: int = 1,
    start: Sequence[torch.Tensor],
) -> list[torch.Tensor]:
    """Cores T_k (out/S, in/S) float64 that lower mean w ||y - W' x||² by ``sweeps`` of block descent from ``start``.

    ``cross`` C = mean w y xᵀ (out, in), ``gram`` G = mean w x xᵀ (in, in). ``ridge``: λ as a multiple of the mean
    diagonal of ptr_k(G); it pulls every core towards its start. With 0 the loss falls with every step towards the
    least squares optimum.
    Raises CheckpointError when the moments are not finite.
    """
    if not bool(torch.isfinite(cross).all()) or not bool(torch.isfinite(gram).all()):
        raise CheckpointError("calibration statistics are not finite: the model overflows on the calibration text.")
    moments = _squared(gram.double(), shape)
    branches = [_Branch.of(split, moments, shape, ridge) for split in shape.splits]
    anchors = [core.double() * shape.scale for core in start]
    locals_ = list(anchors)
    rest = _widened(cross.double(), shape)
    for branch, local in zip(branches, locals_, strict=True):
        rest -= branch.image(local, moments)
    for _ in range(sweeps):
        for k, branch in enumerate(branches):
            moved = branch.solve(rest, locals_[k], anchors[k])
            rest -= branch.image(moved - locals_[k], moments)
            locals_[k] = moved
    return [local / shape.scale for local in locals_]


@dataclass(frozen=True)
class _Rows:
    """``rows`` of a core whose outputs are real in the same copies; ``gram``: summed over these, ``lower``: factor."""

    rows: torch.Tensor
    gram: torch.Tensor
    ridge: float
    lower: torch.Tensor


@dataclass(frozen=True)
class _Branch:
    """One branch with all that stays the same over the sweeps; ``real``: (wide out, 1) 1 where an output is real."""

    split: tuple[int, int]
    groups: tuple[_Rows, ...]
    real: torch.Tensor

    @classmethod
    def of(cls, split: tuple[int, int], moments: torch.Tensor, shape: MixTShape, ridge: float) -> _Branch:
        left, right = split
        height = shape.core_shape[0]
        real = (torch.arange(height * shape.spectators) < shape.out_features).double()
        copies = real.view(left, height, right).transpose(0, 1)  # (row, a, c)
        diagonal = _copies(moments, split)  # (i, j, a, c)
        groups = []
        for pattern in torch.unique(copies.reshape(height, -1), dim=0):
            if not bool(pattern.any()):
                continue
            rows = (copies.reshape(height, -1) == pattern).all(dim=1).nonzero()[:, 0]
            gram = (diagonal * pattern.view(left, right)).sum((2, 3))
            if not bool(gram.any()):
                continue  # nothing was ever read there: these rows stay what they are
            level = ridge * float(gram.diagonal().mean())
            lower = cholesky(gram + level * torch.eye(len(gram), dtype=torch.float64))
            groups.append(_Rows(rows, gram, level, lower))
        return cls(split, tuple(groups), real[:, None])

    def image(self, local: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
        """(I ⊗ local ⊗ I) G on the real outputs, (wide out, wide in)."""
        left, right = self.split
        height, width = local.shape
        spread = local @ moments.view(left, width, -1)
        return spread.view(left * height * right, -1) * self.real

    def solve(self, rest: torch.Tensor, local: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
        """The core that minimises the loss when the others stay; ``rest`` is C - W' G."""
        wanted = _trace(rest, self.split)
        moved = local.clone()
        for group in self.groups:
            rows = group.rows
            right_side = wanted[rows] + local[rows] @ group.gram + group.ridge * anchor[rows]
            moved[rows] = torch.cholesky_solve(right_side.T, group.lower).T
        return moved


def _trace(matrix: torch.Tensor, split: tuple[int, int]) -> torch.Tensor:
    """ptr_k: (a · out/S · c, a · in/S · c) -> (out/S, in/S), the sum of the diagonal copies."""
    return _copies(matrix, split).sum((2, 3))


def _copies(matrix: torch.Tensor, split: tuple[int, int]) -> torch.Tensor:
    """The diagonal copies themselves, a view (out/S, in/S, a, c) of ``matrix``."""
    left, right = split
    height, width = (size // (left * right) for size in matrix.shape)
    blocks = matrix.view(left, height, right, left, width, right)
    return blocks.diagonal(0, 0, 3).diagonal(0, 1, 3)


def _widened(matrix: torch.Tensor, shape: MixTShape) -> torch.Tensor:
    """A copy of ``matrix`` (out, in) with zero rows and columns at the end, as large as the uncropped operator."""
    height, width = (size * shape.spectators for size in shape.core_shape)
    wide = torch.zeros(height, width, dtype=torch.float64)
    wide[: matrix.shape[0], : matrix.shape[1]] = matrix
    return wide


def _squared(gram: torch.Tensor, shape: MixTShape) -> torch.Tensor:
    """``gram`` (in, in) with zeros where the padded inputs are."""
    width = shape.core_shape[1] * shape.spectators
    wide = torch.zeros(width, width, dtype=torch.float64)
    wide[: len(gram), : len(gram)] = gram
    return wide
