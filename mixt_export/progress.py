"""Progress reporting: the library talks to this protocol, the command line draws it with rich."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Advance = Callable[[int], None]


class Progress(Protocol):
    """What long-running functions report to."""

    def task(self, label: str, total: int | None = None) -> AbstractContextManager[Advance]:
        """Open a task of ``total`` units (None: unknown); call the yielded function with units done."""
        ...

    def note(self, message: str) -> None:
        """Say one line."""
        ...


class Silent:
    """The default: reports nothing."""

    @contextmanager
    def task(self, label: str, total: int | None = None) -> Iterator[Advance]:
        """See Progress.task."""
        yield lambda _units: None

    def note(self, message: str) -> None:
        """See Progress.note."""


SILENT = Silent()
