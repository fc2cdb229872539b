"""The tensor train that serves the inputs: min tr((T - W') S (T - W')ᵀ) over the cores of W' and a sparse residual.

With S = I (no inputs) or S = S_1 ⊗ … ⊗ S_D over the input modes this is TT-SVD: W' (L_1 ⊗ … ⊗ L_D), S_k = L_k L_kᵀ, is
a train of the same ranks, and L_k^-1 folds back into core k. A Gram matrix is no such product, so the start is TT-SVD
under the nearest one that its partial traces give, and alternating least squares goes on from there: W' is linear in
one core when the others stand still, so each step is a linear least squares problem. It is solved by conjugate
gradients, which need the gradient alone: its normal matrix would have (r_{k-1} i_k r_k)² numbers. With the other cores
orthogonalised, the product that the partial traces give is a preconditioner of three small factors. Every step lowers
the loss or leaves it.

Float64; S (in, in) symmetric positive definite, T (out, in).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch

from mixt_export.compression.roots import cholesky
from mixt_export.compression.tensor_train.decomposition import assembled, balanced_gauge, interleaved, tt_svd
from mixt_export.compression.tensor_train.modes import Modes

Linear = Callable[[torch.Tensor], torch.Tensor]

#: Conjugate gradients end when the preconditioned residual has fallen by this factor.
_TOLERANCE = 1e-3
#: Share of the mean diagonal added to the small factors of the preconditioner, which may be singular.
_RIDGE = 1e-6


@dataclass(frozen=True)
class Outliers:
    """Entries that are stored beside the train: ``rows``, ``columns`` (nnz,) int64 and ``values`` (nnz,)."""

    rows: torch.Tensor
    columns: torch.Tensor
    values: torch.Tensor

    def matrix(self, like: torch.Tensor) -> torch.Tensor:
        """As a dense (out, in), of the shape and dtype of ``like``."""
        found = torch.zeros_like(like)
        found[self.rows, self.columns] = self.values.to(like.dtype)
        return found

    @classmethod
    def largest(cls, matrix: torch.Tensor, count: int) -> Outliers:
        """The ``count`` entries of ``matrix`` of largest magnitude, in the order of rows, then columns."""
        chosen = matrix.abs().flatten().topk(count).indices.sort().values
        rows, columns = chosen // matrix.shape[1], chosen % matrix.shape[1]
        return cls(rows, columns, matrix[rows, columns])


@dataclass(frozen=True)
class Train:
    """``cores`` float64 in a balanced gauge, ``outliers`` where some were asked for; ``losses`` of the start and after
    every sweep, relative to tr(T S Tᵀ)."""

    cores: list[torch.Tensor]
    outliers: Outliers | None
    losses: tuple[float, ...]

    def matrix(self, modes: Modes) -> torch.Tensor:
        """W' (out, in), outliers included."""
        found = assembled(self.cores, modes)
        return found if self.outliers is None else found + self.outliers.matrix(found)


def marginals(gram: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
    """S_k (i_k, i_k) with S_1 ⊗ … ⊗ S_D ≈ ``gram``: its partial traces, exact when it is such a product.

    Each has mean diagonal 1 but the first, which carries the scale.
    """
    found = []
    for site, size in enumerate(sizes):
        before, after = prod(sizes[:site]), prod(sizes[site + 1 :])
        blocks = gram.reshape(before, size, after, before, size, after)
        traced = blocks.diagonal(0, 0, 3).diagonal(0, 1, 3).sum((2, 3))
        level = float(traced.diagonal().mean())
        found.append(traced / level if level > 0 else torch.eye(size, dtype=gram.dtype))
    found[0] = found[0] * float(gram.diagonal().mean())
    return found


def whitened_svd(
    target: torch.Tensor, metrics: Sequence[torch.Tensor] | None, modes: Modes, ranks: Sequence[int]
) -> list[torch.Tensor]:
    """Cores of TT-SVD of T under S = ⊗ ``metrics`` (None: the identity)."""
    if metrics is None:
        return tt_svd(target, modes, ranks)
    lowers = [cholesky(metric) for metric in metrics]
    cores = tt_svd(whiten(target, lowers), modes, ranks)
    # core · L^-1 on the axis i: the solution X of X L = core
    return [
        torch.linalg.solve_triangular(lower, core.movedim(2, 3), upper=False, left=False).movedim(3, 2)
        for core, lower in zip(cores, lowers, strict=True)
    ]


def whiten(target: torch.Tensor, lowers: Sequence[torch.Tensor]) -> torch.Tensor:
    """T (L_1 ⊗ … ⊗ L_D)."""
    sizes = [len(lower) for lower in lowers]
    found = target.reshape(len(target), *sizes)
    for axis, lower in enumerate(lowers, 1):
        found = torch.tensordot(found, lower, dims=([axis], [0])).movedim(-1, axis)
    return found.reshape(target.shape)


def fit(
    target: torch.Tensor,
    gram: torch.Tensor | None,
    modes: Modes,
    start: Sequence[torch.Tensor],
    *,
    sweeps: int,
    steps: int,
    outliers: Outliers | None = None,
) -> Train:
    """Improve ``start`` by ``sweeps`` over all cores (and the values of ``outliers``), ``steps`` of CG at each.

    ``gram`` None: S = I. With ``outliers`` the train stands for T without them.
    """
    target = target.double()
    problem = _Problem(target, None if gram is None else gram.double(), modes)
    cores = _right_orthogonal(list(start))
    losses = [problem.loss(cores, outliers)]
    for _ in range(sweeps):
        for site in range(len(cores)):
            cores[site] = problem.improved(cores, site, outliers, steps)
            if site + 1 < len(cores):
                _move_right(cores, site)
        if outliers is not None:
            outliers = problem.improved_values(cores, outliers, steps)
        losses.append(problem.loss(cores, outliers))
        cores = _right_orthogonal(cores)
    return Train(balanced_gauge(cores), outliers, tuple(losses))


class _Problem:
    """The loss and its least squares problems, for cores of which those before a site are left- and those behind
    right-orthogonal."""

    def __init__(self, target: torch.Tensor, gram: torch.Tensor | None, modes: Modes) -> None:
        self.target, self.gram, self.modes = target, gram, modes
        self.metrics = None if gram is None else marginals(gram, modes[0])
        self.energy = float((self._weighted(target) * target).sum())

    def loss(self, cores: Sequence[torch.Tensor], outliers: Outliers | None) -> float:
        rest = self._rest(cores, outliers)
        return float((self._weighted(rest) * rest).sum()) / self.energy if self.energy > 0 else 0.0

    def improved(self, cores: Sequence[torch.Tensor], site: int, outliers: Outliers | None, steps: int) -> torch.Tensor:
        """Core ``site`` after ``steps`` of CG from what it is."""
        inputs, outputs = self.modes
        left, right = _merged_left(cores[:site]), _merged_right(cores[site + 1 :])
        size = outputs[site] * inputs[site]

        def gradient(matrix: torch.Tensor) -> torch.Tensor:
            """What a change of the core by one changes of ⟨matrix, W'⟩."""
            tensor = interleaved(matrix, self.modes).reshape(len(left), size, right.shape[1])
            return torch.einsum("pa,psq,bq->asb", left, tensor, right).reshape(cores[site].shape)

        def image(core: torch.Tensor) -> torch.Tensor:
            """W' of a core, (out, in)."""
            return assembled([*cores[:site], core, *cores[site + 1 :]], self.modes)

        moved = _conjugate_gradients(
            lambda core: gradient(self._weighted(image(core))),
            gradient(self._weighted(self._rest(cores, outliers))),
            self._preconditioner(left, right, site),
            steps,
        )
        return cores[site] + moved

    def improved_values(self, cores: Sequence[torch.Tensor], outliers: Outliers, steps: int) -> Outliers:
        """The outliers with better values at the same places."""
        rows, columns = outliers.rows, outliers.columns
        wanted = self._weighted(self._rest(cores, outliers))[rows, columns]
        if self.gram is None:
            return Outliers(rows, columns, outliers.values + wanted)

        def apply(values: torch.Tensor) -> torch.Tensor:
            return self._weighted(Outliers(rows, columns, values).matrix(self.target))[rows, columns]

        scale = self.gram.diagonal()[columns]
        moved = _conjugate_gradients(apply, wanted, lambda values: values / scale, steps)
        return Outliers(rows, columns, outliers.values + moved)

    def _rest(self, cores: Sequence[torch.Tensor], outliers: Outliers | None) -> torch.Tensor:
        rest = self.target - assembled(cores, self.modes)
        if outliers is not None:
            rest[outliers.rows, outliers.columns] -= outliers.values
        return rest

    def _weighted(self, matrix: torch.Tensor) -> torch.Tensor:
        return matrix if self.gram is None else matrix @ self.gram

    def _preconditioner(self, left: torch.Tensor, right: torch.Tensor, site: int) -> Linear:
        """The inverse of the normal matrix under ⊗ metrics: one small matrix per axis of the core."""
        if self.metrics is None:
            return lambda core: core  # the other cores are orthogonal: the normal matrix is the identity
        inputs, outputs = self.modes
        before = _weighted_sites(left.T, outputs[:site], inputs[:site], self.metrics[:site])
        after = _weighted_sites(right, outputs[site + 1 :], inputs[site + 1 :], self.metrics[site + 1 :])
        lowers = [cholesky(_ridged(matrix)) for matrix in (before @ left, self.metrics[site], after @ right.T)]

        def solve(core: torch.Tensor) -> torch.Tensor:
            for axis, lower in zip((0, 2, 3), lowers, strict=True):
                first = core.movedim(axis, 0)
                core = torch.cholesky_solve(first.reshape(len(first), -1), lower).reshape(first.shape).movedim(0, axis)
            return core

        return solve


def _conjugate_gradients(apply: Linear, wanted: torch.Tensor, precondition: Linear, steps: int) -> torch.Tensor:
    """X with apply(X) ≈ ``wanted`` after at most ``steps`` of preconditioned conjugate gradients from zero."""
    found = torch.zeros_like(wanted)
    rest = wanted.clone()
    direction = solved = precondition(rest)
    length = first = float((rest * solved).sum())
    for _ in range(steps):
        if length <= _TOLERANCE**2 * first or length <= 0.0:
            break
        moved = apply(direction)
        curvature = float((direction * moved).sum())
        if curvature <= 0.0:
            break
        found = found + (length / curvature) * direction
        rest = rest - (length / curvature) * moved
        solved = precondition(rest)
        before, length = length, float((rest * solved).sum())
        direction = solved + (length / before) * direction
    return found


def _merged_left(cores: Sequence[torch.Tensor]) -> torch.Tensor:
    """(∏ o_k i_k, r) of the cores before a site."""
    found = torch.ones(1, 1, dtype=torch.float64)
    for core in cores:
        found = (found @ core.reshape(core.shape[0], -1)).reshape(-1, core.shape[-1])
    return found


def _merged_right(cores: Sequence[torch.Tensor]) -> torch.Tensor:
    """(r, ∏ o_k i_k) of the cores behind a site."""
    found = torch.ones(1, 1, dtype=torch.float64)
    for core in reversed(cores):
        found = (core.reshape(-1, core.shape[-1]) @ found).reshape(core.shape[0], -1)
    return found


def _weighted_sites(
    rows: torch.Tensor, outputs: Sequence[int], inputs: Sequence[int], metrics: Sequence[torch.Tensor]
) -> torch.Tensor:
    """``rows`` (r, o_1 i_1 o_2 i_2 …) times I ⊗ S_1 ⊗ I ⊗ S_2 …, the same shape."""
    sizes = [size for pair in zip(outputs, inputs, strict=True) for size in pair]
    found = rows.reshape(len(rows), *sizes)
    for axis, metric in zip(range(2, 2 * len(metrics) + 1, 2), metrics, strict=True):
        found = torch.tensordot(found, metric, dims=([axis], [0])).movedim(-1, axis)
    return found.reshape(rows.shape)


def _ridged(matrix: torch.Tensor) -> torch.Tensor:
    level = _RIDGE * float(matrix.diagonal().mean()) + 1e-300
    return matrix + level * torch.eye(len(matrix), dtype=matrix.dtype)


def _right_orthogonal(cores: list[torch.Tensor]) -> list[torch.Tensor]:
    """The same matrix with every core but the first orthogonal in its rows (r, o i r')."""
    found = list(cores)
    for site in range(len(found) - 1, 0, -1):
        core = found[site]
        q, r = torch.linalg.qr(core.reshape(core.shape[0], -1).T)
        found[site] = q.T.reshape(-1, *core.shape[1:])
        found[site - 1] = torch.tensordot(found[site - 1], r.T, dims=([3], [0]))
    return found


def _move_right(cores: list[torch.Tensor], site: int) -> None:
    """Make core ``site`` orthogonal in its columns and let the next one carry the rest, in place."""
    core = cores[site]
    q, r = torch.linalg.qr(core.reshape(-1, core.shape[-1]))
    cores[site] = q.reshape(*core.shape[:3], -1)
    cores[site + 1] = torch.tensordot(r, cores[site + 1], dims=([1], [0]))
