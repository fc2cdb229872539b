"""Which products of a tensor mixture touch real features: counts of its matrix' support, exact and without weights.

Term k (from 0 to N-1) connects input i and output o when both lie in the same of its a = d^k blocks and have the same
remainder modulo c = d^(N-1-k). Supports of terms k < m meet where i and o share the finer block (of m) and the coarser
remainder (of k), which all terms between them contain too; so the union is Σ |B_k| − Σ |B_k ∩ B_(k+1)|, the chain form
of inclusion-exclusion.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from mixt_export.plan import Mixture


def cropped_macs(mixture: Mixture) -> int:
    """Multiply-adds per token of all terms when padded inputs are skipped and cropped outputs are not computed."""
    return sum(_connected(mixture, term, term) for term in range(len(mixture.terms)))


def nonzeros(mixture: Mixture) -> int:
    """Entries of the (out, in) matrix that some term reaches: multiply-adds per token of a merged block-sparse form."""
    overlaps = sum(_connected(mixture, term + 1, term) for term in range(len(mixture.terms) - 1))
    return cropped_macs(mixture) - overlaps


def _connected(mixture: Mixture, blocks_of: int, remainder_of: int) -> int:
    """Pairs (i, o) of features in the same block of one term with the same remainder of another."""
    blocks = mixture.bond**blocks_of
    modulus = mixture.bond ** (len(mixture.terms) - 1 - remainder_of)
    wide_out, wide_in = mixture.padded_features
    return _pairs(blocks, modulus, (wide_in, mixture.in_features), (wide_out, mixture.out_features))


@lru_cache(maxsize=4096)
def _pairs(blocks: int, modulus: int, inputs: tuple[int, int], outputs: tuple[int, int]) -> int:
    """The same from sizes; a model has a few of them. ``inputs``, ``outputs``: padded width and features."""
    return int((_members(blocks, modulus, *inputs) * _members(blocks, modulus, *outputs)).sum())


def _members(blocks: int, modulus: int, wide: int, features: int) -> NDArray[np.int64]:
    """How many of the features below ``features`` each (block, remainder) of the padded width ``wide`` has."""
    edges = np.minimum(np.arange(blocks + 1, dtype=np.int64) * (wide // blocks), features)
    remainders = np.arange(modulus, dtype=np.int64)
    below = np.maximum(edges[:, None] - remainders[None, :] + modulus - 1, 0) // modulus
    return np.diff(below, axis=0)
