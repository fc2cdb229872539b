"""Pivot rows of a two-factor linear: r of its rows as they are, the others as combinations of them.

A matrix W = U V of rank r has r rows W_p that span all others: W_np = C W_p. Then y_p = W_p x, y_np = C y_p, and
r·(in + out) - r² numbers stand for W where the factors hold r·(in + out); nothing is approximated (PIFA: Zhao, Zhang
and Cannistraci, ICML 2025, arXiv:2501.19090). The rows are those of an interpolative decomposition (Cheng, Gimbutas,
Martinsson and Rokhlin, SIAM J. Sci. Comput. 26, 2005): greedy pivots, then exchanges while C has an entry beyond
`BOUND`, each of which multiplies the volume of the pivots by more than that (Gu and Eisenstat, SIAM J. Sci. Comput. 17,
1996).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import hypot
from typing import Any

import numpy as np

from mixt_export.network import FactorizedLinear
from mixt_export.network.matmuls import LEFT_SUFFIX
from mixt_export.plan.networks import NetworkForm
from mixt_export.plan.operations import Operation

Array = np.ndarray[Any, Any]
Load = Callable[[str], Array]

NAME = "pivot"

BOUND = 2.0
"""Largest |entry| of C that exchanges leave."""

LOSS = 64.0
"""Relative Frobenius error of the rewritten matrix, in units of its dtype's rounding, beyond which it is refused."""


@dataclass(frozen=True, slots=True)
class PivotForm(NetworkForm):
    """Both factors merged into ``rank`` rows of their product and what makes the others of them."""

    rank: int = 0


@dataclass(frozen=True)
class Pivots:
    """W (out, in) = [W_p; C W_p] in the order ``order``.

    ``rows`` (in, r): W_p transposed; ``rest`` (r, out - r): C transposed, both float64. ``order`` (out,) int32: output
    o is number order[o] of the pivots followed by the others. ``error``: estimate of the relative Frobenius error once
    both are rounded. ``refusal``: why this must not stand for W, empty where it may.
    """

    rows: Array
    rest: Array
    order: Array
    error: float
    refusal: str


def pivot_form(linear: FactorizedLinear) -> PivotForm | None:
    """The form ``pivot`` of ``linear``; None where it is no product of two matrices, or its rank exceeds a side."""
    if len(linear.branches) != 1:
        return None
    (branch,) = linear.branches
    if len(branch.cores) != 2 or len(branch.in_modes) != 1 or len(branch.out_modes) != 1 or branch.padded:
        return None
    (i, columns), (o, outputs) = branch.in_modes[0], branch.out_modes[0]
    down = next((core for core in branch.cores if i in core.labels), None)
    up = next((core for core in branch.cores if o in core.labels), None)
    if down is None or up is None or down is up or len(down.labels) != 2 or len(up.labels) != 2:
        return None
    (bond,) = set(down.labels) - {i}
    rank = branch.sizes()[bond]
    if set(up.labels) != {bond, o} or rank > min(columns, outputs):
        return None
    others = outputs - rank
    operations = [Operation("right", 1, 1, columns, rank, columns * rank)]
    if others:
        operations.append(Operation("right", 1, 1, rank, others, rank * others))
        moving = Operation("transpose", inner=0, moved=2 * outputs)
        copying = Operation("pad", moved=2 * outputs)
        operations += [copying, moving, copying, moving]  # joined; outputs first, put in order, outputs last
    nnz = 0
    if linear.sparse is not None:
        nnz = linear.sparse.nnz
        operations.append(Operation("sparse", weights=nnz, moved=2 * nnz + 2 * outputs))
    if linear.bias is not None:
        operations.append(Operation("elementwise", moved=2 * outputs))
    elements = rank * (columns + others) + nnz
    groups = (((0, 1),),)
    biased = linear.bias is not None
    return PivotForm(
        NAME, columns, outputs, groups, (), elements, tuple(operations), biased, LEFT_SUFFIX, rank
    )  # fmt: skip


def factors(linear: FactorizedLinear, load: Load) -> tuple[Array, Array]:
    """(in, r) and (r, out) in float64, the branch's scale in the second; of a linear that has the form."""
    (branch,) = linear.branches
    (i, _), (o, _) = branch.in_modes[0], branch.out_modes[0]
    down = next(core for core in branch.cores if i in core.labels)
    up = next(core for core in branch.cores if o in core.labels)
    first, second = (load(core.tensor.name).astype(np.float64) for core in (down, up))
    return (
        first if down.labels[0] == i else first.T,
        branch.scale * (second.T if up.labels[0] == o else second),
    )


def pivots(down: Array, up: Array, unit: float, *, bound: float = BOUND, loss: float = LOSS) -> Pivots:
    """Pivots of W = (down · up)ᵀ for ``down`` (in, r) and ``up`` (r, out), r ≤ in and r ≤ out, both float64.

    ``unit``: relative rounding error of the dtype in which the result is stored. The rows are compared as rows of W,
    not of ``up``: an ill-conditioned factor whose partner makes up for it costs nothing.
    """
    rank, outputs = up.shape
    if not (np.isfinite(down).all() and np.isfinite(up).all()):
        return Pivots(down[:, :0], up[:0], np.zeros(0, np.int32), np.inf, "its factors hold values that are not finite")
    rows = (np.linalg.qr(down, mode="r") @ up).T  # those of W in an orthonormal basis: all norms are W's
    chosen, basis = _greedy(rows)
    inside = rows @ basis.T
    chosen = _exchanged(inside, chosen, bound)
    spare = np.setdiff1d(np.arange(outputs), chosen)[: rank - len(chosen)]  # of a matrix of lower rank: any others
    taken = np.sort(np.concatenate([chosen, spare]))
    others = np.setdiff1d(np.arange(outputs), taken)
    rest = np.zeros((len(others), rank))
    places = np.searchsorted(taken, chosen)
    rest[:, places] = _combinations(inside, chosen, others)
    error = _error(rows, taken, others, rest, unit)
    largest = float(np.abs(rest).max(initial=0.0))
    refusal = ""
    if not largest <= bound * (1 + 1e-6):
        refusal = f"some rows need more than {bound:g} times a pivot row ({largest:.3g})"
    elif not error <= loss * unit:
        refusal = f"rounding would cost {error:.3g} of the matrix, more than {loss * unit:.3g}"
    order = np.argsort(np.concatenate([taken, others])).astype(np.int32)
    return Pivots(down @ up[:, taken], np.ascontiguousarray(rest.T), order, error, refusal)


def _greedy(rows: Array) -> tuple[Array, Array]:
    """Numbers of the rows of a QR decomposition with pivoting, and the orthonormal basis (k, r) of their span.

    Squared norms of what is left of each row are brought up to date instead of computed anew, which loses digits as
    they fall: they are computed anew each time the largest has fallen by a factor of 10⁶ (norms: 10³).
    """
    count, width = rows.shape
    basis = np.empty((width, width))
    left = np.einsum("ij,ij->i", rows, rows)
    largest = reference = float(left.max(initial=0.0))
    smallest = largest * (np.finfo(np.float64).eps * max(count, width)) ** 2
    chosen: list[int] = []
    while len(chosen) < width:
        done = basis[: len(chosen)]
        if left.max() < 1e-6 * reference:
            rest = rows - (rows @ done.T) @ done
            left = np.einsum("ij,ij->i", rest, rest)
            left[chosen] = -1.0
            reference = float(left.max())
        pivot = int(left.argmax())
        if left[pivot] <= smallest:
            break
        row = rows[pivot]
        for _ in range(2):  # once is not orthogonal to the last digit, twice is
            row = row - done.T @ (done @ row)
        basis[len(chosen)] = row / np.linalg.norm(row)
        left -= (rows @ basis[len(chosen)]) ** 2
        chosen.append(pivot)
        left[chosen] = -1.0
    return np.array(chosen, np.int64), basis[: len(chosen)]


def _exchanged(inside: Array, chosen: Array, bound: float) -> Array:
    """``chosen`` with rows exchanged until no other row of ``inside`` (rows, k) needs more than ``bound`` of one."""
    others = np.setdiff1d(np.arange(len(inside)), chosen)
    chosen = chosen.copy()
    found = _combinations(inside, chosen, others)
    for _ in range(4 * len(chosen)):
        if not np.abs(found).max(initial=0.0) > bound:
            break
        out, pivot = divmod(int(np.abs(found).argmax()), len(chosen))
        scale = found[out, pivot]
        change = found[out] / scale
        change[pivot] = 1.0 - 1.0 / scale
        column = found[:, pivot].copy()
        column[out] = 0.0
        row = -found[out] / scale
        row[pivot] = 1.0 / scale
        found -= np.outer(column, change)
        found[out] = row
        others[out], chosen[pivot] = chosen[pivot], others[out]
    return chosen


def _combinations(inside: Array, chosen: Array, others: Array) -> Array:
    """C (others, k) with inside[others] = C inside[chosen]."""
    if not len(chosen):
        return np.zeros((len(others), 0))
    solved: Array = np.linalg.solve(inside[chosen].T, inside[others].T).T
    return solved


def _error(rows: Array, taken: Array, others: Array, rest: Array, unit: float) -> float:
    """Estimate of the relative Frobenius error of W with W_p and C rounded to ``unit``.

    The last terms are what independent roundings of the entries add up to: of C, and of W_p through C.
    """
    norms = np.linalg.norm(rows, axis=1)
    whole = float(np.linalg.norm(norms))
    if whole == 0.0:
        return 0.0
    residual = float(np.linalg.norm(rows[others] - rest @ rows[taken]))
    carried = unit * float(np.linalg.norm(rest * norms[taken]))
    return hypot(residual, unit * whole, carried, carried) / whole
