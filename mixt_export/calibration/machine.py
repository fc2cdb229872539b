"""What this machine's processor is called and how large its second-level cache is."""

from __future__ import annotations

import platform
import re
from pathlib import Path

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20}


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name as the operating system gives it."""
    found = re.search(r"^(?:model name|Hardware|Model)\s*:\s*(.+)$", _read(cpuinfo), re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or platform.machine() or "unknown CPU"


def second_level_cache(caches: Path = _CACHES) -> int | None:
    """Bytes of the second-level cache of the first core, None where the operating system does not say."""
    for index in sorted(caches.glob("index*")):
        size = re.fullmatch(r"(\d+)([KM]?)", _read(index / "size").strip())
        if _read(index / "level").strip() == "2" and size:
            return int(size.group(1)) * _UNITS[size.group(2)]
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
