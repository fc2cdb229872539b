"""Peak resident memory of a piece of Python, measured in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

# VmHWM belongs to the address space; ru_maxrss would start from the peak of the process that ran the test.
_PRELUDE = """
import sys
from pathlib import Path
def peak_kb():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
"""


def growth_kb(setup: str, work: str, *arguments: str) -> int:
    """By how many KB ``work`` raises the peak that ``setup`` left; both see ``sys.argv[1:]`` = ``arguments``."""
    code = f"{_PRELUDE}\n{setup}\nbefore = peak_kb()\n{work}\nprint(peak_kb() - before)"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    return int(done.stdout)
