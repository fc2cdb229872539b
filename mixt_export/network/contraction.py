"""What a factorised linear computes, in numpy: its einsum, its dense matrix, its product with an input."""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

import numpy as np
import opt_einsum

from mixt_export.errors import NetworkError
from mixt_export.network.ir import Branch, FactorizedLinear, SparseResidual, TensorRef
from mixt_export.network.order import Order, best_orders, steps

Array = np.ndarray[Any, Any]
Load = Callable[[str], Array]
"""Values of a tensor by name."""


def einsum(branch: Branch) -> str:
    """Equation of ``branch`` for numpy.einsum(equation, x, core0, core1, …): ``...ab,bc->...ac``.

    x is (..., in modes) and the result (..., out modes); letters are dealt in order of first appearance. A label that
    passes through is in x and the result only. Scale and padding are not part of it.
    """
    letter = dict(zip(branch.sizes(), string.ascii_letters, strict=False))
    cores = ["".join(letter[label] for label in core.labels) for core in branch.cores]
    source = "..." + "".join(letter[label] for label, _ in branch.in_modes)
    target = "..." + "".join(letter[label] for label, _ in branch.out_modes)
    return ",".join((source, *cores)) + "->" + target


def densify(linear: FactorizedLinear, load: Load) -> Array:
    """The (out_features, in_features) matrix of ``linear`` in float64, sparse residual included, bias not.

    Cores are contracted with each other, never with an input: with ``apply`` this gives two independent answers.
    Raises NetworkError when a loaded tensor has another shape than described or a sparse index lies outside.
    """
    total = np.zeros((linear.out_features, linear.in_features))
    for branch in linear.branches:
        dense = _branch_matrix(linear, branch, load)
        total += branch.scale * dense[: linear.out_features, : linear.in_features]
    if linear.sparse is not None:
        rows, cols, values = _coordinates(linear, linear.sparse, load)
        np.add.at(total, (rows, cols), values.astype(np.float64))
    return total


def apply(linear: FactorizedLinear, load: Load, x: Array) -> Array:
    """Y = linear(x) for x (..., in_features), contracting the input with one core after the other; bias included.

    Computes in float64 for a float64 ``x``, else in float32, and returns that dtype. Raises NetworkError when x ends in
    another size than in_features, and as ``densify`` and ``best_order``.
    """
    if x.ndim == 0 or x.shape[-1] != linear.in_features:
        raise NetworkError(f"Linear {linear.name!r}: expected x (..., {linear.in_features}), found shape {x.shape}.")
    dtype = np.dtype(np.float64 if x.dtype == np.float64 else np.float32)
    flat = np.asarray(x, dtype).reshape(-1, linear.in_features)
    y = np.zeros((len(flat), linear.out_features), dtype)
    for branch, order in zip(linear.branches, best_orders(linear), strict=True):
        y += dtype.type(branch.scale) * _branch_product(linear, branch, order, load, flat)[:, : linear.out_features]
    if linear.sparse is not None:
        rows, cols, values = _coordinates(linear, linear.sparse, load)
        np.add.at(y.T, rows, (flat[:, cols] * values.astype(dtype)).T)
    if linear.bias is not None:
        y += _values(linear, linear.bias, load).astype(dtype)
    return y.reshape(*x.shape[:-1], linear.out_features)


def _branch_matrix(linear: FactorizedLinear, branch: Branch, load: Load) -> Array:
    """(∏ out_modes, ∏ in_modes), unscaled.

    A label in both input and output stands for a diagonal: its input end gets a label of its own, joined by an
    identity.
    """
    outputs = {label for label, _ in branch.out_modes}
    number = {label: index for index, label in enumerate(branch.sizes())}
    operands: list[Any] = []
    for core in branch.cores:
        values = _values(linear, core.tensor, load).astype(np.float64)
        operands += [values, [number[label] for label in core.labels]]
    ends: list[int] = []
    for label, size in branch.in_modes:
        end = number[label]
        if label in outputs:
            end = len(number) + len(ends)
            operands += [np.eye(size), [number[label], end]]
        ends.append(end)
    kept = [number[label] for label, _ in branch.out_modes] + ends
    dense: Array = opt_einsum.contract(*operands, kept, optimize="auto")
    return dense.reshape(branch.out_size, branch.in_size)


def _branch_product(linear: FactorizedLinear, branch: Branch, order: Order, load: Load, x: Array) -> Array:
    """(tokens, ∏ out_modes) of x (tokens, in), unscaled."""
    padding = branch.in_size - linear.in_features
    state = np.pad(x, ((0, 0), (0, padding))) if padding else x
    state = state.reshape(len(x), *(size for _, size in branch.in_modes))
    labels = tuple(label for label, _ in branch.in_modes)
    for index, (_, after) in zip(order, steps(branch, order), strict=True):
        core = branch.cores[index]
        values = _values(linear, core.tensor, load).astype(x.dtype)
        state = _step(state, labels, values, core.labels, after)
        labels = after
    axes = [labels.index(label) + 1 for label, _ in branch.out_modes]
    return state.transpose(0, *axes).reshape(len(x), branch.out_size)


def _step(
    state: Array, labels: tuple[str, ...], core: Array, core_labels: tuple[str, ...], after: tuple[str, ...]
) -> Array:
    letter = dict(zip(dict.fromkeys(labels + core_labels), string.ascii_letters, strict=False))
    left, right, result = ("".join(letter[label] for label in group) for group in (labels, core_labels, after))
    return np.asarray(np.einsum(f"...{left},{right}->...{result}", state, core, optimize=True))


def _values(linear: FactorizedLinear, tensor: TensorRef, load: Load) -> Array:
    values = np.asarray(load(tensor.name))
    if values.shape != tensor.shape:
        raise NetworkError(
            f"Linear {linear.name!r}: expected tensor {tensor.name!r} of shape {tensor.shape}, loaded {values.shape}."
        )
    return values


def _coordinates(linear: FactorizedLinear, sparse: SparseResidual, load: Load) -> tuple[Array, Array, Array]:
    rows, cols = (_values(linear, tensor, load).astype(np.int64) for tensor in (sparse.rows, sparse.cols))
    for tensor, indices, bound in ((sparse.rows, rows, linear.out_features), (sparse.cols, cols, linear.in_features)):
        outside = indices[(indices < 0) | (indices >= bound)]
        if outside.size:
            raise NetworkError(
                f"Linear {linear.name!r}: expected indices 0..{bound - 1} in {tensor.name!r}, found {outside[0]}."
            )
    return rows, cols, _values(linear, sparse.values, load)
