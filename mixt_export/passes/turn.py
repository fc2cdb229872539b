"""Turn the bond of low-rank factors before they become integers: V G and G⁻¹ U, so that all channels are alike. Exact.

Factors as they are stored have channels of very different sizes, most of all those of a singular value decomposition,
and a scale serves a block of them. With V U = P diag(s) Qᵀ the factors become P diag(s^share) R and
Rᵀ diag(s^(1 - share)) Qᵀ, R a random rotation: every row of the bond is a mixture of all directions, so that entries
are distributed as a Gaussian's, which few codes serve best (the reason for rotations in QuIP, arXiv:2307.13304, and
QuaRot, arXiv:2404.00456; here the bond is the factors' own, and nothing else in the model has to turn).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mixt_export import network
from mixt_export.checkpoints import Checkpoint, Made, overlaid
from mixt_export.errors import MixtError
from mixt_export.network import Branch, Core, FactorizedLinear
from mixt_export.network.contraction import Load
from mixt_export.passes.base import PassResult
from mixt_export.passes.kept import kept
from mixt_export.progress import SILENT, Progress

Matrix = NDArray[np.float64]

#: Power of the singular values that the first factor keeps; measured on SmolLM2 (docs/balance.md).
SHARE = 0.25
#: Largest relative difference of outputs: the factors are rounded to float32 once.
_SAME = 1e-5


@dataclass(frozen=True)
class Pair:
    """The two factors of a linear, y = x · V · U: the cores, and whether each is stored transposed."""

    first: Core
    second: Core
    first_turned: bool
    second_turned: bool

    def read(self, load: Load) -> tuple[Matrix, Matrix]:
        """V (in, rank) and U (rank, out), float64."""
        first, second = (load(core.tensor.name).astype(np.float64) for core in (self.first, self.second))
        return first.T if self.first_turned else first, second.T if self.second_turned else second

    def stored(self, first: Matrix, second: Matrix) -> dict[str, Matrix]:
        """V and U as the cores hold them, by their names."""
        return {
            self.first.tensor.name: first.T if self.first_turned else first,
            self.second.tensor.name: second.T if self.second_turned else second,
        }


def pairs(factors: Mapping[str, FactorizedLinear]) -> dict[str, Pair]:
    """Linears of two matrices that no other linear shares, whose rank is at most their features."""
    uses = Counter(core.name for linear in factors.values() for core in linear.core_tensors())
    found = {}
    for name, linear in factors.items():
        if len(linear.branches) == 1 and all(uses[core.name] == 1 for core in linear.core_tensors()):
            pair = _pair(linear.branches[0])
            if pair is not None:
                found[name] = pair
    return found


def _pair(branch: Branch) -> Pair | None:
    if len(branch.cores) != 2 or len(branch.in_modes) != 1 or len(branch.out_modes) != 1 or branch.padded:
        return None
    (i, inputs), (o, outputs) = *branch.in_modes, *branch.out_modes
    first, second = sorted(branch.cores, key=lambda core: i not in core.labels)
    if {len(first.labels), len(second.labels)} != {2} or i not in first.labels or o not in second.labels:
        return None
    (bond,) = set(first.labels) - {i}
    rank = dict(first.modes())[bond]
    if bond not in second.labels or bond == o or rank > min(inputs, outputs):
        return None
    return Pair(first, second, first.labels[0] == bond, second.labels[0] == o)


def turned(first: Matrix, second: Matrix, share: float = SHARE, seed: int = 0) -> tuple[Matrix, Matrix]:
    """V (in, rank) and U (rank, out) with the same product, turned; the rank is at most in and out."""
    left, corner_left = np.linalg.qr(first)
    right, corner_right = np.linalg.qr(second.T)
    vectors, values, others = np.linalg.svd(corner_left @ corner_right.T)
    rotation, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(values), len(values))))
    one = left @ (vectors * values**share) @ rotation
    return one, rotation.T @ (values[:, None] ** (1 - share) * (others @ right.T))


@dataclass(frozen=True)
class Turn:
    """The pass. ``linears``: names of those to turn, of `pairs`. ``folder``: where factors are kept (float32)."""

    linears: Collection[str]
    folder: Path
    progress: Progress = SILENT
    name: str = "turn"

    def requires(self, checkpoint: Checkpoint) -> None:
        """Raise MixtError for a linear that is not of two matrices of its own."""
        strange = sorted(set(self.linears) - pairs(checkpoint.factors).keys())
        if strange:
            raise MixtError(f"Linear {strange[0]!r}: is not of two factors, which could be turned. Please report this.")

    def call(self, checkpoint: Checkpoint) -> PassResult:
        """Turn every linear by itself; its factors are read once."""
        known = pairs(checkpoint.factors)
        tensors: dict[str, Made] = {}
        factors: dict[str, FactorizedLinear] = {}
        with self.progress.task("turning factors", len(self.linears)) as advance:
            for name in self.linears:
                pair = known[name]
                first, second = turned(*pair.read(lambda core: checkpoint.store.read(core, "float64")))
                for core, values in pair.stored(first, second).items():
                    path = self.folder / f"turned_{len(tensors):06d}.npy"
                    tensors[core] = kept(values.astype(np.float32), path)
                factors[name] = _at_float32(checkpoint.factors[name])
                advance(1)
        if not factors:
            return PassResult(checkpoint, False)
        return PassResult(overlaid(checkpoint, tensors, factors), True, {"linears": len(factors), "share": SHARE})

    def ensures(self, checkpoint: Checkpoint, result: PassResult) -> None:
        """Every turned linear maps a random input to what it did, but for the rounding of its factors to float32."""
        rng = np.random.default_rng(0)
        for name in self.linears:
            before, after = checkpoint.factors[name], result.checkpoint.factors[name]
            x = rng.standard_normal((1, before.in_features))
            old = network.apply(before, checkpoint.store.read, x)
            new = network.apply(after, result.checkpoint.store.read, x)
            if not float(np.linalg.norm(new - old)) <= _SAME * float(np.linalg.norm(old)):
                raise MixtError(f"Linear {name!r}: turning changed what it computes. Please report this.")


def _at_float32(linear: FactorizedLinear) -> FactorizedLinear:
    branches = tuple(
        replace(
            branch,
            cores=tuple(replace(core, tensor=replace(core.tensor, dtype="float32")) for core in branch.cores),
        )
        for branch in linear.branches
    )
    return replace(linear, branches=branches)
