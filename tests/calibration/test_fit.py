"""The fit: constants that made the times are found again, disturbed times do not decide, none falls below zero."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mixt_export.calibration.fit import Measurement, errors, fit, nonnegative
from mixt_export.calibration.grid import COUNTS, grid
from mixt_export.plan.cost import amounts, operation_seconds
from mixt_export.plan.devices import CPU, RATES

TRUE = replace(CPU, mac=3e-11, node=2e-6, stream=5e-10, transpose=8e-10, write_far=7e-10, cache=1 << 20)


def measured(noise: float = 0.0, spoilt: int = 0) -> list[Measurement]:
    rng = np.random.default_rng(0)
    found = []
    for index, probe in enumerate(grid()):
        seconds = operation_seconds(probe.operation, probe.tokens, TRUE) * (1 + noise * rng.standard_normal())
        found.append(Measurement(probe.operation, probe.tokens, seconds * (4 if index < spoilt else 1)))
    return found


def test_the_constants_that_made_the_times_are_found() -> None:
    found = fit(measured(), replace(CPU, cache=1 << 20))
    for name in set(RATES) - {"gather"}:
        assert getattr(found, name) == pytest.approx(getattr(TRUE, name), rel=1e-4), name
    assert (found.gather, found.tile, found.cache, found.name) == (CPU.gather, CPU.tile, 1 << 20, CPU.name)


def test_noise_and_disturbed_times_do_not_decide() -> None:
    found = fit(measured(noise=0.05, spoilt=12), replace(CPU, cache=1 << 20))
    assert found.mac == pytest.approx(TRUE.mac, rel=0.1) and found.stream == pytest.approx(TRUE.stream, rel=0.15)
    assert float(np.median(np.abs(errors(measured(), found)))) < 0.1


def test_no_constant_falls_below_zero() -> None:
    rng = np.random.default_rng(1)
    matrix, target = rng.random((40, 5)), rng.random(40) - 0.3
    x = nonnegative(matrix, target)
    assert (x >= 0).all()
    gradient = matrix.T @ (target - matrix @ x)
    assert (gradient[x == 0] <= 1e-9).all() and np.abs(gradient[x > 0]).max(initial=0) < 1e-9  # Karush-Kuhn-Tucker
    assert (nonnegative(-matrix, np.ones(40)) == 0).all()


def test_the_grid_bears_on_every_constant_that_is_fitted() -> None:
    work = [amounts(probe.operation, probe.tokens, CPU) for probe in grid()]
    for name in set(RATES) - {"gather"}:
        assert sum(name in amount for amount in work) >= 4, name
    kinds = [probe.operation.kind for probe in grid()]
    assert {kind: kinds.count(kind) for kind in COUNTS} == COUNTS
    assert grid() == grid() and {probe.tokens for probe in grid()} == {1, 16, 128}
    assert 0 < len(grid(0.1)) < len(grid()) / 5
