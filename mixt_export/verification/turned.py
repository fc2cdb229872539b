"""Factors that were turned before they became integers: only their product is known to the model they came from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from mixt_export.checkpoints import Checkpoint
from mixt_export.errors import UsageError
from mixt_export.passes.turn import Pair, pairs
from mixt_export.quantisation.blocks import dequantised
from mixt_export.verification.quantised import Matrix


def turned_pairs(
    linears: Iterable[str], matrices: Mapping[str, Matrix], checkpoint: Checkpoint
) -> dict[str, tuple[Pair, Matrix, Matrix]]:
    """The two factors of each of ``linears``, and the matrices that their integers are.

    Raises UsageError where ``checkpoint`` or ``matrices`` have none.
    """
    known = pairs(checkpoint.factors)
    by_part = {matrix.parts[0]: matrix for matrix in matrices.values() if len(matrix.parts) == 1}
    found = {}
    for name in linears:
        pair = known.get(name)
        first = None if pair is None else by_part.get(pair.first.tensor.name)
        second = None if pair is None else by_part.get(pair.second.tensor.name)
        if pair is None or first is None or second is None:
            raise UsageError(
                f"{checkpoint.path}: the manifest's quantisation.turned names {name!r}, which is not of two factors "
                "that became integers; export again, or give the model folder that was exported with --reference."
            )
        found[name] = (pair, first, second)
    return found


def product_error(pair: Pair, first: Matrix, second: Matrix, checkpoint: Checkpoint) -> float:
    """||V' U' - V U|| / ||V U|| (Frobenius) of integers' values V', U' and the factors of ``checkpoint``, in float64.

    V U is multiplied and divided by what smoothing did to the linear, as the integers are. By the corners of [V' -V]
    and [U'; U], so that no matrix of the linear's size is made.
    """
    ours = [dequantised(matrix.blocks()).T.astype(np.float64) for matrix in (first, second)]
    inner, outer = pair.read(lambda core: checkpoint.store.read(core, "float64"))
    if first.inputs is not None:
        inner = inner * first.inputs[:, None]
    if second.outputs is not None:
        outer = outer / second.outputs
    size = _norm(inner, outer)
    rest = _norm(np.concatenate([ours[0], -inner], axis=1), np.concatenate([ours[1], outer]))
    return rest / max(size, float(np.finfo(np.float64).tiny))


def _norm(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """||first · second||."""
    inner, outer = np.linalg.qr(first)[1], np.linalg.qr(second.T)[1]
    return float(np.linalg.norm(inner @ outer.T))
