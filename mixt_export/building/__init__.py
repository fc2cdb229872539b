"""TensorRT engines of exported folders: building, the device bundle, golden tensors.

The work itself is done by runtimes/tensorrt, which also runs on a board without this package; this room starts it in a
process of its own and writes what it needs next to a model.
"""

from __future__ import annotations

from mixt_export.building.build import BuildReport, build_engine, installed_backend
from mixt_export.building.bundle import write_bundle
from mixt_export.building.golden import record_golden

__all__ = ["BuildReport", "build_engine", "installed_backend", "record_golden", "write_bundle"]
