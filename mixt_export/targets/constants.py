"""Whose costs an export plans with: the default CPU, this machine's calibrated one, or a file's."""

from __future__ import annotations

from pathlib import Path

from mixt_export.calibration import load_device
from mixt_export.calibration.store import local_path
from mixt_export.errors import UsageError
from mixt_export.plan import CPU, Device

DEFAULT, LOCAL = "default", "local"


def constants_named(text: str, target: str) -> Device:
    """``default``: constants that are part of this package, so that an export depends on nothing but its inputs.
    ``local``: those that `mixt calibrate-device` stored for this machine. Else the file they are in.

    Raises UsageError for a file that is missing or damaged, and for target trt, whose board is known by name.
    """
    if text == DEFAULT:
        return CPU
    if target == "trt":
        raise UsageError(f"--device-constants {text}: describes a CPU; for --target trt name the board with --device.")
    return load_device(local_path() if text == LOCAL else Path(text))
