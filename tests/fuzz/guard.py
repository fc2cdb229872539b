"""What watches a case while it runs: the files it opens, the processor time and the memory it takes."""

from __future__ import annotations

import os
import signal
import sys
import sysconfig
import time
import tracemalloc
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

#: CPU seconds that a case of a few kilobytes may take: wall time would depend on what else the machine does.
SECONDS = 20.0
#: Wall seconds after which a case that computes nothing counts as hanging too: it waits for a pipe, say.
WAITING = 120.0
#: Bytes that Python and numpy may hold at once beside a multiple of the folder's size: parsed JSON is larger than text.
ALLOWANCE, TIMES = 6 << 20, 40


class HangError(BaseException):
    """A case took more than SECONDS of CPU or WAITING of wall time. No Exception, so that no reader can swallow it."""


@dataclass
class Watch:
    """What happened during a case: ``outside`` are paths opened that are neither the folder's nor the interpreter's.

    ``named``: real paths that may be opened, too.
    """

    folder: Path
    named: Collection[str] = ()
    outside: list[str] = field(default_factory=list)
    peak: int = 0


_LIBRARIES = tuple(
    os.path.realpath(path)
    for path in {sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), str(Path(__file__).parents[2])}
)
_HARMLESS = ("/proc/", "/sys/", "/dev/null", "/usr/", "/lib")
_EVENTS = frozenset({"open", "os.listdir", "os.scandir", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir"})
_active: list[Watch] = []
_installed: list[bool] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _active or event not in _EVENTS:
        return
    path = arguments[0]
    if not isinstance(path, str | bytes | os.PathLike):
        return
    watch = _active[-1]
    real = os.path.realpath(os.fsdecode(path))
    if real == str(watch.folder) or real in watch.named or real.startswith(f"{watch.folder}{os.sep}"):
        return
    if not real.startswith((*_LIBRARIES, *_HARMLESS)):
        watch.outside.append(f"{event} {real}")


def _expired(_number: int, _frame: FrameType | None) -> None:
    raise HangError


@contextmanager
def watched(folder: Path, named: Collection[str] = ()) -> Iterator[Watch]:
    """Record what the block opens and allocates; ends it with HangError when it takes too long."""
    if not _installed:
        sys.addaudithook(_hook)
        _installed.append(True)
    watch = Watch(folder.resolve(), named)
    before = [signal.signal(number, _expired) for number in (signal.SIGPROF, signal.SIGALRM)]
    began = time.monotonic()
    left, _ = signal.setitimer(signal.ITIMER_REAL, WAITING)  # a test runner may have set it
    tracemalloc.start(1)
    _active.append(watch)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield watch
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in zip((signal.SIGPROF, signal.SIGALRM), before, strict=True):
            signal.signal(number, handler)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - began), 0.001))
        _active.pop()
        watch.peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()


def allowed_bytes(folder_bytes: int) -> int:
    """The most that reading a folder of ``folder_bytes`` may allocate."""
    return ALLOWANCE + TIMES * folder_bytes
