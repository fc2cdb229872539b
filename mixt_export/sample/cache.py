"""Where downloads and the sample model are kept between runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ModuleNotFoundError:  # not POSIX: two simultaneous first runs then both do the work, and the last one stays
    fcntl = None  # type: ignore[assignment]


def cache_folder(cache: Path | None = None) -> Path:
    """``cache``, else $MIXT_CACHE, else $XDG_CACHE_HOME/mixt-export, else ~/.cache/mixt-export. Touches nothing."""
    if cache is not None:
        return cache.absolute()
    own = os.environ.get("MIXT_CACHE")
    if own:
        return Path(own).expanduser().absolute()
    shared = os.environ.get("XDG_CACHE_HOME")
    root = Path(shared) if shared and Path(shared).is_absolute() else Path.home() / ".cache"
    return root / "mixt-export"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of the cache ``folder`` (made if missing), so that parallel runs do the work once."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as handle:
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
