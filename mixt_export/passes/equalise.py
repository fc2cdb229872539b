"""Choose the numbers of gauge freedoms so that slices of tensors reach equally far: coordinate descent on log2 maxima.

For one freedom they are known in closed form. With m the largest |entry| of a slice in log2, less its target, averaged
over the tensors that t multiplies (m₊) and over those that it divides (m₋): t = (m₋ - m₊) / 2 makes the two equal. For
two cores that is cross-layer equalisation (Nagel et al. 2019, arXiv:1906.04721, equation 11): slices of both reach
√(m₁ m₂). Freedoms meet in tensors, so they are visited in turn until nothing moves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixt_export.passes.gauge import Freedom

Floats = NDArray[np.float64]
#: Exponents of one tensor by the axes they run along, to be added up.
Exponents = dict[tuple[int, ...], Floats]

_SWEEPS = 24
#: A sweep that moves no exponent by more than this is the last (general D; whole exponents end by themselves).
_STILL = 1e-3


def equalised(
    freedoms: Sequence[Freedom],
    tensors: Mapping[str, NDArray[Any]],
    targets: Mapping[str, float] | None = None,
    *,
    whole: bool = True,
) -> dict[str, Exponents]:
    """Exponents to base 2 per tensor that bring the largest |entry| of every slice to its target, as near as possible.

    ``tensors``: values, or largest |values| of an intermediate, by name; scaled in place. ``targets``: log2 of what the
    slices of a tensor should reach (default 0). ``whole``: whole numbers, so that scaling by 2^t is exact in every
    binary format. Slices that are zero in one of the tensors are left alone.
    """
    goals = dict(targets or {})
    found: dict[str, Exponents] = {name: {} for name in tensors}
    magnitudes = {name: np.abs(values, out=values) for name, values in tensors.items()}
    for _ in range(_SWEEPS):
        moved = 0.0
        for freedom in freedoms:
            step = _best(freedom, magnitudes, goals, whole)
            largest = float(np.abs(step).max(initial=0.0))
            if largest:
                _apply(freedom, step, magnitudes, found)
                moved = max(moved, largest)
        if moved <= (0.0 if whole else _STILL):
            break
    return {name: exponents for name, exponents in found.items() if exponents}


def scaled(values: NDArray[Any], exponents: Exponents) -> NDArray[Any]:
    """``values`` (float32 or float64) · 2^exponents along their axes, in their dtype; exact for whole exponents."""
    total = np.zeros(1)
    for axes, power in exponents.items():
        total = total + _along(power, axes, values.ndim)
    if np.array_equal(total, np.rint(total)):
        return np.asarray(np.ldexp(values, total.reshape(total.shape[-values.ndim :]).astype(np.int32)))
    return np.asarray(values.astype(np.float64) * np.exp2(total))


def reach(values: NDArray[Any], axes: tuple[int, ...]) -> Floats:
    """log2 of the largest |value| of every slice along ``axes``, in their order; -inf for slices of zeros."""
    others = tuple(axis for axis in range(values.ndim) if axis not in axes)
    most = np.abs(values).max(axis=others, initial=0.0)
    order = [sorted(axes).index(axis) for axis in axes]
    with np.errstate(divide="ignore"):
        return np.log2(np.asarray(most, np.float64).transpose(order))


def _best(freedom: Freedom, magnitudes: Mapping[str, NDArray[Any]], goals: Mapping[str, float], whole: bool) -> Floats:
    sides: dict[int, list[Floats]] = {1: [], -1: []}
    for (name, axes), power in freedom.powers.items():
        sides[power].append(reach(magnitudes[name], axes) - goals.get(name, 0.0))
    step = (np.mean(sides[-1], axis=0) - np.mean(sides[1], axis=0)) / 2.0
    step = np.where(np.isfinite(step), step, 0.0)
    return np.rint(step) if whole else np.asarray(step)


def _apply(freedom: Freedom, step: Floats, magnitudes: dict[str, NDArray[Any]], found: dict[str, Exponents]) -> None:
    for (name, axes), power in freedom.powers.items():
        magnitudes[name] *= np.exp2(_along(power * step, axes, magnitudes[name].ndim)).astype(magnitudes[name].dtype)
        known = found[name].get(axes)
        found[name][axes] = power * step if known is None else known + power * step


def _along(power: Floats, axes: tuple[int, ...], ndim: int) -> Floats:
    """``power`` with its axes at ``axes`` of an array of ``ndim`` axes, 1 elsewhere."""
    order = [int(axis) for axis in np.argsort(axes)]
    shape = [1] * ndim
    for place, size in zip(axes, power.shape, strict=True):
        shape[place] = size
    return power.transpose(order).reshape(shape)
