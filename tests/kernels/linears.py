"""Linears to run kernels on, and what they compute: dense matrices in float64, made without any code of the package."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from mixt_export.building.toolkit import toolkit

tactics = toolkit("tactics")


@dataclass(frozen=True)
class Case:
    """A linear (tactics.Train or tactics.Mixture), its tokens, and its arrays in the kernel's dtype."""

    name: str
    linear: Any
    x: np.ndarray
    matrices: list[np.ndarray]
    bias: np.ndarray | None
    dense: np.ndarray
    """(in, out), float64, of the rounded matrices."""

    def expected(self) -> np.ndarray:
        y = self.x.astype(np.float64) @ self.dense
        return y if self.bias is None else y + self.bias.astype(np.float64)


def train(name: str, inside: tuple[int, ...], outside: tuple[int, ...], ranks: tuple[int, ...], dtype: str,
          tokens: int, bias: bool = False) -> Case:  # fmt: skip
    rng = np.random.default_rng(len(name) * 1000 + tokens)
    bonds = (1, *ranks, 1)
    cores = []
    for site, (i, o) in enumerate(zip(inside, outside, strict=True)):
        core = rng.standard_normal((bonds[site], o, i, bonds[site + 1])) / np.sqrt(i * bonds[site + 1])
        cores.append(core.astype(dtype))
    dense = np.ones((1, 1, 1))  # (inputs, outputs, bond)
    for core in cores:
        dense = np.einsum("ior,rpjs->ijops", dense, core.astype(np.float64))
        dense = dense.reshape(dense.shape[0] * dense.shape[1], dense.shape[2] * dense.shape[3], -1)
    x = rng.standard_normal((tokens, prod(inside))).astype(dtype)
    b = rng.standard_normal(prod(outside)).astype(dtype) if bias else None
    return Case(name, tactics.Train(inside, outside, ranks, dtype, bias), x, cores, b, dense[:, :, 0])


def mixture(name: str, core: tuple[int, int], bond: int, partition: tuple[int, ...], features: tuple[int, int] | None,
            transposed: bool, dtype: str, tokens: int, bias: bool = False) -> Case:  # fmt: skip
    """``core`` (in, out) of one term; ``partition``: terms in each window; ``features`` where they are cropped."""
    rng = np.random.default_rng(len(name) * 1000 + tokens)
    terms = sum(partition)
    whole_in, whole_out = (size * bond ** (terms - 1) for size in core)
    used_in, used_out = features or (whole_in, whole_out)
    windows, weights, first = [], [], 0
    dense = np.zeros((whole_in, whole_out))
    for count in partition:
        left, right = bond**first, bond ** (terms - first - count)
        columns, rows = (size * bond ** (count - 1) for size in core)
        if features and left == 1:
            columns, rows = -(-used_in // right), -(-used_out // right)
        elif features:
            left = min(-(-used_out // (rows * right)), -(-used_in // (columns * right)))
        weight = (rng.standard_normal((columns, rows)) / np.sqrt(columns)).astype(dtype)
        block = np.kron(np.kron(np.eye(left), weight.astype(np.float64)), np.eye(right))
        dense[: block.shape[0], : block.shape[1]] += block[:whole_in, :whole_out]
        windows.append(tactics.Window(left, rows, columns, right))
        weights.append(np.ascontiguousarray(weight.T) if transposed else weight)
        first += count
    x = rng.standard_normal((tokens, used_in)).astype(dtype)
    b = rng.standard_normal(used_out).astype(dtype) if bias else None
    linear = tactics.Mixture(used_in, used_out, tuple(windows), transposed, dtype, bias)
    return Case(name, linear, x, weights, b, dense[:used_in, :used_out])
