"""Calibrated constants as a JSON file: written whole or not at all, read as untrusted data."""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixt_export.calibration.machine import cpu_name
from mixt_export.checkpoints.strictjson import load_object
from mixt_export.errors import CheckpointError, UsageError
from mixt_export.plan.devices import CPU, RATES, Device
from mixt_export.sample import cache_folder

if TYPE_CHECKING:
    from mixt_export.calibration.measure import Calibration

SCHEMA = 1
_KEYS = {"schema", "cpu", "onnxruntime", "threads", "operators", "median_error", "within_20_percent", "device"}
_SIZES = {"tile": 1 << 12, "cache": 1 << 40}
"""Whole-number constants and the most they can be."""


def stored_path(cpu: str, onnxruntime: str, threads: int = 1) -> Path:
    """Where the constants of a CPU, a version of ONNX Runtime and a number of threads are kept."""
    slug = re.sub(r"[^a-z0-9]+", "-", f"{cpu} ort {onnxruntime} threads {threads}".lower()).strip("-")
    return cache_folder() / "devices" / f"{slug}.json"


def local_path(threads: int = 1) -> Path:
    """`stored_path` of this machine."""
    import onnxruntime

    return stored_path(cpu_name(), str(onnxruntime.__version__), threads)


def require_writable(path: Path) -> None:
    """Try the folder of ``path``, or the next above that is there, so that nothing is measured in vain.

    Raises OSError.
    """
    above = path.absolute().parent
    while not above.exists():
        above = above.parent
    with tempfile.TemporaryDirectory(prefix=".mixt-", dir=above):
        pass


def save(calibration: Calibration, path: Path) -> None:
    """Write ``calibration`` to ``path``; an interruption leaves what was there."""
    values = {
        "schema": SCHEMA,
        "cpu": calibration.cpu,
        "onnxruntime": calibration.onnxruntime,
        "threads": calibration.threads,
        "operators": len(calibration.measurements),
        "median_error": round(calibration.median_error, 4),
        "within_20_percent": round(calibration.within_20_percent, 4),
        "device": calibration.device.as_dict(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    part = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(json.dumps(values, indent=1) + "\n")
        part.chmod(0o644)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def load_device(path: Path) -> Device:
    """The constants in ``path``. Raises UsageError in one sentence for a file that is missing, damaged or of another
    version."""
    again = "run `mixt calibrate-device` again"
    if not path.is_file():
        raise UsageError(f"{path}: no such file of device constants; run `mixt calibrate-device`.")
    try:
        values = load_object(path, limit=1 << 20)
    except CheckpointError as error:
        raise UsageError(f"{path}: damaged device constants ({_reason(error, path)}); {again}.") from None
    if values.get("schema") != SCHEMA:
        raise UsageError(f"{path}: schema {values.get('schema')!r} of device constants, expected {SCHEMA}; {again}.")
    found = values.get("device")
    if set(values) != _KEYS or not isinstance(found, dict):
        raise UsageError(f"{path}: expected the keys {', '.join(sorted(_KEYS))}; {again}.")
    return _device(found, f"{path}: ", again)


def _device(found: dict[str, Any], where: str, again: str) -> Device:
    expected = set(CPU.as_dict())
    if set(found) != expected:
        odd = sorted(set(found) ^ expected)[0]
        raise UsageError(f"{where}the constant {odd!r} is {'missing' if odd in expected else 'unknown'}; {again}.")
    if not isinstance(found["name"], str) or not found["name"].strip() or len(found["name"]) > 300:
        raise UsageError(f"{where}the device's name must be a text of at most 300 characters; {again}.")
    for name in RATES:
        if not _number(found[name]) or not 0 <= found[name] < 1:
            raise UsageError(f"{where}{name} must be seconds from 0 to 1, found {found[name]!r}; {again}.")
    for name, most in _SIZES.items():
        if isinstance(found[name], bool) or not isinstance(found[name], int) or not 1 <= found[name] <= most:
            raise UsageError(f"{where}{name} must be a whole number from 1 to {most}, found {found[name]!r}; {again}.")
    if not any(found[name] > 0 for name in RATES):
        raise UsageError(f"{where}every constant is zero; {again}.")
    rates = {name: float(found[name]) for name in RATES}
    return Device(name=found["name"], tile=found["tile"], cache=found["cache"], **rates)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _reason(error: CheckpointError, path: Path) -> str:
    return str(error).removeprefix(f"{path}: ").split(";")[0]
