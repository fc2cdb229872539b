"""Resident memory of this process."""

from __future__ import annotations

import ctypes
import resource
import sys
from functools import cache
from typing import Any


@cache
def _trimmer() -> Any:
    """glibc's malloc_trim, or None with another C library."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None


def release_freed() -> None:
    """Hand freed heap pages back to the system.

    Weights of block after block are allocated and freed between small objects that live on; glibc keeps the holes, and
    resident memory creeps up by most of a block per block although nothing holds them. Does nothing elsewhere.
    """
    trim = _trimmer()
    if trim is not None:
        trim(0)


def peak_rss() -> int:
    """Highest resident memory of this process so far, bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
