"""Measure what the planner needs to know about this machine's CPU, and keep it."""

from mixt_export.calibration.machine import cpu_name
from mixt_export.calibration.store import load_device, save, stored_path

__all__ = ["cpu_name", "load_device", "save", "stored_path"]
