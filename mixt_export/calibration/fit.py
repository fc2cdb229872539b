"""Constants of a device from measured operators: least squares on relative errors, no constant below zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mixt_export.plan.cost import amounts, operation_seconds
from mixt_export.plan.devices import RATES, Device
from mixt_export.plan.operations import Operation

_FLOOR = 1e-6
"""Seconds below which an operator's time is not told apart from its start."""

_TOLERANCE = 0.2
"""Relative error from which a measurement counts less: one that was disturbed should not decide."""

_ROUNDS = 8
Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Measurement:
    """Seconds of ``operation`` for ``tokens`` tokens."""

    operation: Operation
    tokens: int
    seconds: float


def fit(measurements: Sequence[Measurement], device: Device) -> Device:
    """``device`` with every constant that the ``measurements`` bear on replaced by its least-squares estimate.

    Minimises the squared differences of predicted and measured time relative to the geometric mean of the two, so that
    half and double count alike, with constants >= 0; differences beyond 20 % count linearly. Name, tile and cache stay.
    """
    work = [amounts(measured.operation, measured.tokens, device) for measured in measurements]
    names = [name for name in RATES if any(name in amount for amount in work)]
    matrix = np.array([[amount.get(name, 0.0) for name in names] for amount in work])
    times = np.array([measured.seconds for measured in measurements])
    scale = matrix.max(axis=0)
    predicted, weight = times, np.ones(len(times))
    found = np.zeros(len(names))
    for _ in range(_ROUNDS):
        relative = weight / (np.sqrt(times * predicted) + _FLOOR)
        found = nonnegative(matrix / scale * relative[:, None], times * relative) / scale
        predicted = matrix @ found
        error = np.abs(np.log((predicted + _FLOOR) / (times + _FLOOR)))
        weight = 1 / np.sqrt(np.maximum(1, error / _TOLERANCE))
    values: dict[str, Any] = {**device.as_dict(), **dict(zip(names, map(float, found), strict=True))}
    return Device(**values)


def errors(measurements: Sequence[Measurement], device: Device) -> Array:
    """(predicted - measured) / measured of each."""
    return np.array([operation_seconds(m.operation, m.tokens, device) / m.seconds - 1 for m in measurements])


def nonnegative(matrix: Array, target: Array) -> Array:
    """x >= 0 with the least |matrix · x - target| (Lawson and Hanson, Solving Least Squares Problems, ch. 23)."""
    count = matrix.shape[1]
    passive = np.zeros(count, bool)
    x = np.zeros(count)
    tolerance = 1e-10 * float(np.abs(matrix.T @ target).max(initial=0.0))
    for _ in range(10 * count):
        gradient = matrix.T @ (target - matrix @ x)
        gradient[passive] = -np.inf
        chosen = int(np.argmax(gradient))
        if passive.all() or gradient[chosen] <= tolerance:
            break
        passive[chosen] = True
        while True:
            trial = np.zeros(count)
            trial[passive] = np.linalg.lstsq(matrix[:, passive], target, rcond=None)[0]
            if trial[passive].min() > 0:
                x = trial
                break
            blocking = passive & (trial <= 0)
            step = float((x[blocking] / np.maximum(x[blocking] - trial[blocking], 1e-300)).min())
            x = x + step * (trial - x)
            passive &= x > 1e-14 * float(np.abs(x).max(initial=0.0))
            x[~passive] = 0
            if not passive.any():
                break
    return x
