"""Recovery: distillation of a dense model into a factorised one made from it.

Imports lazily: ``recover`` needs torch and transformers, settings and report nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mixt_export.compression.recover.report import RecoverReport
from mixt_export.compression.recover.settings import RecoverSettings
from mixt_export.optional import require

if TYPE_CHECKING:
    from mixt_export.compression.recover.run import recover

__all__ = ["RecoverReport", "RecoverSettings", "recover"]


def __getattr__(name: str) -> Any:
    if name == "recover":
        require("torch", "Recovering a model")
        require("transformers", "Recovering a model")
        return importlib.import_module("mixt_export.compression.recover.run").recover
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
