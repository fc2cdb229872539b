"""Draw progress with rich, on stderr, so that stdout stays clean for results."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from mixt_export.progress import Advance


class RichProgress:
    """A mixt_export.progress.Progress drawn with rich."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._bars: Bars | None = None

    @contextmanager
    def task(self, label: str, total: int | None = None) -> Iterator[Advance]:
        """See Progress.task. Nested tasks share one display; where stderr is no terminal nothing is drawn."""
        if not self.console.is_terminal:
            yield lambda _units: None
            return
        outermost = self._bars is None
        if self._bars is None:
            self._bars = Bars(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                console=self.console,
                transient=True,
            )
            self._bars.start()
        bars = self._bars
        handle = bars.add_task(label, total=total)
        try:
            yield lambda units: bars.advance(handle, units)
        finally:
            bars.remove_task(handle)
            if outermost:
                bars.stop()
                self._bars = None

    def note(self, message: str) -> None:
        """See Progress.note."""
        self.console.print(message, highlight=False, markup=False)
