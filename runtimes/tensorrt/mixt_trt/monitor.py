"""Progress of a build, and a way to stop it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

#: (phase, parent phase or None, steps done, steps in all)
Report = Callable[[str, "str | None", int, int], None]


def make_monitor(module: Any, report: Report, stopped: Callable[[], bool]) -> Any:
    """A progress monitor of ``module`` that calls ``report`` and ends the build once ``stopped()`` is true.

    TensorRT calls it from its own threads and dies of an exception, so none leaves it: the first one is kept as the
    attribute ``failure`` and stops the build.
    """

    class Monitor(module.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)
            self.failure: BaseException | None = None
            self._steps: dict[str, tuple[str | None, int]] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = (parent_phase, num_steps)
            self._report(phase_name, 0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._report(phase_name, step + 1)
            return self.failure is None and not stopped()

        def phase_finish(self, phase_name: str) -> None:
            _, steps = self._steps.get(phase_name, (None, 0))
            self._report(phase_name, steps)

        def _report(self, phase: str, done: int) -> None:
            parent, steps = self._steps.get(phase, (None, done))
            try:
                report(phase, parent, done, steps)
            except BaseException as error:
                self.failure = self.failure or error

    return Monitor()
