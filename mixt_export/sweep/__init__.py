"""The paper's experiment: replace the last N_B blocks for several N_B, measure each model, find the transition.

Imports lazily: ``sweep`` needs torch and transformers, the options nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mixt_export.optional import require
from mixt_export.sweep.options import SweepOptions

if TYPE_CHECKING:
    from mixt_export.sweep.run import SweepResult, sweep

__all__ = ["SweepOptions", "SweepResult", "sweep"]


def __getattr__(name: str) -> Any:
    if name in ("sweep", "SweepResult"):
        require("torch", "Sweeping over compressed models")
        require("transformers", "Sweeping over compressed models")
        return getattr(importlib.import_module("mixt_export.sweep.run"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
