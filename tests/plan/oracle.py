"""MixT by its definition, in float64: no code shared with the package beyond the description itself."""

from __future__ import annotations

import numpy as np

from mixt_export.network import FactorizedLinear, build

#: (in, out, terms, bond, paper_padding): exact and padded, odd multiples, bonds 2 and 3, wide and tall.
CASES = [
    (6, 10, 2, 2, False),
    (12, 20, 3, 2, False),
    (24, 8, 4, 2, False),
    (48, 16, 5, 2, False),
    (9, 15, 2, 3, False),
    (27, 9, 3, 3, False),
    (54, 27, 4, 3, False),
    (13, 7, 2, 2, True),
    (11, 29, 3, 2, True),
    (33, 18, 4, 2, True),
    (40, 104, 5, 2, True),
    (48, 104, 3, 3, True),
    (20, 11, 3, 3, True),
]


def case(n_in: int, n_out: int, terms: int, bond: int, padded: bool, seed: int = 0):
    """The description, its random cores by name (float32), and the matrix (out, in) in float64."""
    linear = build.mixt("linear", n_in, n_out, terms, bond=bond, paper_padding=padded)
    rng = np.random.default_rng(seed)
    cores = {ref.name: rng.standard_normal(ref.shape).astype(np.float32) for ref in linear.tensors()}
    return linear, cores, matrix(linear, list(cores.values()), terms, bond)


def matrix(linear: FactorizedLinear, cores: list[np.ndarray], terms: int, bond: int) -> np.ndarray:
    """(1/N) Σ_k I_(d^(k-1)) ⊗ T_k ⊗ I_(d^(N-k)), cropped to (out, in)."""
    total = 0.0
    for k, core in enumerate(cores, 1):
        left, right = np.eye(bond ** (k - 1)), np.eye(bond ** (terms - k))
        total = total + np.kron(np.kron(left, core.astype(np.float64)), right)
    return np.asarray(total)[: linear.out_features, : linear.in_features] / terms
