"""Time every operator of the grid in ONNX Runtime and fit the device's constants to the times."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mixt_export.calibration.fit import Measurement, errors, fit
from mixt_export.calibration.grid import grid
from mixt_export.calibration.machine import cpu_name, second_level_cache
from mixt_export.calibration.probe import Probe, empty, node, session, timed
from mixt_export.errors import ResourceError
from mixt_export.plan.devices import CPU, Device
from mixt_export.progress import SILENT, Progress

_PASSES = 3
"""Times each operator is measured, far apart, so that what disturbs one does not disturb both."""

_SLICES = 7
"""Timings per pass, of which the lower quartile counts: what else runs can only lengthen a time."""

_SLICE = 2e-3
"""Seconds a timing lasts at least."""

_LEAST = 1e-7
"""Seconds below which an operator cannot be told from the slice behind it; such a time is left out."""


@dataclass(frozen=True)
class Calibration:
    """Constants fitted to ``measurements``, on ``cpu`` with ``threads`` threads of ONNX Runtime ``onnxruntime``."""

    device: Device
    measurements: tuple[Measurement, ...]
    cpu: str
    onnxruntime: str
    threads: int

    @property
    def median_error(self) -> float:
        """Median of |predicted - measured| / measured over the operators."""
        return float(np.median(np.abs(errors(self.measurements, self.device))))

    @property
    def within_20_percent(self) -> float:
        """Share of the operators predicted that well."""
        return float((np.abs(errors(self.measurements, self.device)) <= 0.2).mean())


def calibrate(threads: int = 1, progress: Progress = SILENT) -> Calibration:
    """Measure this machine's CPU, about a minute. With one thread CPU time counts, else wall time.

    Raises ResourceError when the times are of no use.
    """
    import onnxruntime

    probes = grid()
    start, times = _times(probes, threads, progress)
    found = [
        Measurement(probe.operation, probe.tokens, seconds)
        for probe, seconds in zip(probes, times, strict=True)
        if seconds > _LEAST
    ]
    if 2 * len(found) < len(probes):
        raise ResourceError(
            f"this machine is too busy to be measured: {len(probes) - len(found)} of {len(probes)} operators seem to "
            "take no time; close other programs and try again."
        )
    cpu = cpu_name()
    name = f"{cpu}, onnxruntime {onnxruntime.__version__}, {threads} thread{'s' * (threads > 1)}"
    cache = second_level_cache()
    known = CPU if cache is None else replace(CPU, cache=cache * 3 // 4)
    device = replace(fit(found, known), name=name, node=start)
    return Calibration(device, tuple(found), cpu, str(onnxruntime.__version__), threads)


def _times(probes: Sequence[Probe], threads: int, progress: Progress) -> tuple[float, list[float]]:
    """Seconds to start an operator, and of each probe's operator: the least of all passes."""
    start, best = float("inf"), [float("inf")] * len(probes)
    with progress.task("measuring operators", _PASSES * len(probes)) as advance:
        for _ in range(_PASSES):
            run, behind = empty(threads)
            start = min(start, node(threads))
            for index, probe in enumerate(probes):
                seconds = (_timing(probe, threads) - run) / probe.copies - behind
                best[index] = min(best[index], seconds)
                advance(1)
    return start, best


def _timing(probe: Probe, threads: int) -> float:
    """Seconds of one run of the probe's session."""
    model, x = session(probe, threads)
    once = min(timed(model, x, 1, threads), timed(model, x, 1, threads))
    repeats = max(1, min(50, round(_SLICE / max(once, 1e-6))))
    return statistics.quantiles((timed(model, x, repeats, threads) for _ in range(_SLICES)), n=4)[0]
