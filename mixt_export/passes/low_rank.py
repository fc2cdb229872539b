"""Find dense weights that are numerically low rank and factor them without loss.

Models edited by LASER (arXiv:2312.13558) and the like are published dense, though some of their matrices have a small
rank. A randomised range finder (Halko, Martinsson, Tropp 2011, arXiv:0909.4061, algorithm 4.1) in float64 tells
matrices of full rank for the price of a product; only what it lets through gets a singular value decomposition, of the
small projected matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixt_export.checkpoints import Checkpoint, Made, overlaid
from mixt_export.errors import MixtError, UsageError
from mixt_export.families import decoder_of
from mixt_export.network import FactorizedLinear, build
from mixt_export.passes.base import PassResult
from mixt_export.passes.kept import kept
from mixt_export.progress import SILENT, Progress

Matrix = NDArray[np.float64]

#: Columns that the range finder takes beyond the largest rank that would pay, and vectors that test what is left.
_SPARE, _PROBES = 8, 4


@dataclass(frozen=True)
class Found:
    """One dense weight (out, in): its numerical ``rank`` and what factors of it would be worth.

    ``rank`` is None where it is beyond ``paying``, the largest rank r with r (out + in) < out · in. ``error``:
    ||W - U V||_F / ||W||_F with float32 factors (nan without a rank), ``allowed``: 2^-24 √max(out, in), the rounding of
    a float32 product of that size; factors within it lose nothing.
    """

    name: str
    shape: tuple[int, int]
    rank: int | None
    paying: int
    error: float
    allowed: float

    @property
    def lossless(self) -> bool:
        """Whether factors are smaller than the matrix and as exact as float32 arithmetic."""
        return self.rank is not None and self.error <= self.allowed


@dataclass(frozen=True)
class DetectLowRank:
    """The pass: linears of a decoder whose dense weight has a small rank become two factors, laid over the checkpoint.

    ``tolerance``: singular values up to this share of the largest count as zero. ``folder``: where the factors are kept
    (float32), as long as the result is used. Weights whose factors would not be as exact as float32 arithmetic stay
    dense, whatever the tolerance: those of 16-bit folders often are, because their rounding alone has full rank.
    """

    tolerance: float
    folder: Path
    progress: Progress = SILENT
    name: str = "detect_low_rank"

    def requires(self, checkpoint: Checkpoint) -> None:
        """Raise UsageError for a tolerance out of range, UnsupportedError for a model that is no known decoder."""
        check_tolerance(self.tolerance)
        decoder_of(checkpoint.config)

    def call(self, checkpoint: Checkpoint) -> PassResult:
        """Examine every dense linear once; matrices are read one at a time."""
        tensors: dict[str, Made] = {}
        factors: dict[str, FactorizedLinear] = {}
        linears: dict[str, Any] = {}
        for found, pair in examine(checkpoint, self.tolerance, self.progress):
            if pair is None or not found.lossless:
                continue
            linear = _linear(checkpoint, found)
            factors[found.name] = linear
            for core, values in zip(linear.core_tensors(), pair, strict=True):
                path = self.folder / f"low_rank_{len(tensors):06d}.npy"
                tensors[core.name] = kept(values, path)
            linears[found.name] = {"rank": found.rank, "error": found.error}
        record = {"tolerance": self.tolerance, "linears": linears}
        if not factors:
            return PassResult(checkpoint, False, record)
        return PassResult(overlaid(checkpoint, tensors, factors), True, record)

    def ensures(self, checkpoint: Checkpoint, result: PassResult) -> None:
        """Every replaced linear has the features it had, and factors with fewer numbers than its matrix."""
        for name in result.record["linears"]:
            linear, before = result.checkpoint.factors[name], checkpoint.store.find(f"{name}.weight").ref
            numbers = sum(core.size for core in linear.core_tensors())
            if sorted(before.shape) != sorted((linear.out_features, linear.in_features)) or numbers >= before.size:
                raise MixtError(f"Linear {name!r}: its factors do not replace {before.shape}. Please report this.")


def low_rank_report(checkpoint: Checkpoint, tolerance: float, progress: Progress = SILENT) -> dict[str, Any]:
    """What `mixt inspect --detect-low-rank` says, as JSON data: every dense linear that has a rank worth factoring."""
    every = [found for found, _ in examine(checkpoint, tolerance, progress)]
    ranked = [{**asdict(found), "lossless": found.lossless} for found in every if found.rank is not None]
    return {"tolerance": tolerance, "examined": len(every), "found": ranked}


def check_tolerance(tolerance: float) -> None:
    """Raise UsageError unless ``tolerance`` is a share of the largest singular value."""
    if not 0.0 < tolerance < 1.0:
        raise UsageError(
            f"--detect-low-rank {tolerance:g}: give the share of the largest singular value below which one counts as "
            "zero, between 0 and 1, such as 1e-6."
        )


def examine(
    checkpoint: Checkpoint, tolerance: float, progress: Progress = SILENT
) -> Iterator[tuple[Found, tuple[NDArray[np.float32], NDArray[np.float32]] | None]]:
    """Every dense linear of a decoder in the order of execution, with factors (in, r), (r, out) where a rank was found.

    Raises UnsupportedError for encoders and unknown families.
    """
    linears = [
        linear
        for linear in decoder_of(checkpoint.config).linears
        if linear.name not in checkpoint.factors and f"{linear.name}.weight" in checkpoint.store
    ]
    with progress.task("looking for low rank", len(linears)) as advance:
        for linear in linears:
            stored = checkpoint.store.read(f"{linear.name}.weight", "float64")
            yield examined(linear.name, stored if linear.stored_transposed else stored.T, tolerance)
            advance(1)


def examined(
    name: str, matrix: Matrix, tolerance: float
) -> tuple[Found, tuple[NDArray[np.float32], NDArray[np.float32]] | None]:
    """``matrix`` (in, out) float64, y = x · matrix: what was found, and its factors (in, r), (r, out) in float32."""
    inputs, outputs = matrix.shape
    paying = (inputs * outputs - 1) // (inputs + outputs)
    allowed = 2.0**-24 * math.sqrt(max(inputs, outputs))
    none = Found(name, (outputs, inputs), None, paying, math.nan, allowed)
    size = float(np.linalg.norm(matrix))
    if not size or paying < 1:
        return none, None
    basis = _range(matrix, min(paying + _SPARE, inputs, outputs), tolerance)
    if basis is None:
        return none, None
    left, values, right = np.linalg.svd(basis.T @ matrix, full_matrices=False)
    rank = int((values > tolerance * values[0]).sum())
    if rank > paying:
        return none, None
    root = np.sqrt(values[:rank])
    first = (basis @ (left[:, :rank] * root)).astype(np.float32)
    second = (root[:, None] * right[:rank]).astype(np.float32)
    error = float(np.linalg.norm(matrix - first.astype(np.float64) @ second.astype(np.float64))) / size
    return replace(none, rank=rank, error=error), (first, second)


def _range(matrix: Matrix, columns: int, tolerance: float) -> Matrix | None:
    """An orthonormal basis (in, columns) of what ``matrix`` reaches, or None when it certainly reaches further.

    What the basis misses has a largest singular value of at least ||R ω|| / ||ω|| for any ω, R being the rest; with a
    rank within the tolerance it would be some √(in · columns) times tolerance at most.
    """
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(matrix @ rng.standard_normal((matrix.shape[1], columns)))
    probes = rng.standard_normal((matrix.shape[1], _PROBES))
    image = matrix @ probes
    rest = image - basis @ (basis.T @ image)
    largest = float(np.linalg.norm(image, axis=0).max())
    missed = float(np.linalg.norm(rest, axis=0).max())
    return None if missed > tolerance * math.sqrt(matrix.shape[0] * columns) * largest else basis


def _linear(checkpoint: Checkpoint, found: Found) -> FactorizedLinear:
    outputs, inputs = found.shape
    assert found.rank is not None
    bias = checkpoint.store.refs.get(f"{found.name}.bias")
    linear = build.low_rank(found.name, inputs, outputs, found.rank, method="detected")
    return replace(linear, bias=bias)
