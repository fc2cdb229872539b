"""Recovery: distillation of a dense model into a factorised one made from it.

Imports lazily: ``recover`` and ``compress_and_recover`` need torch and transformers, settings and report nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mixt_export.compression.recover.report import RecoverReport
from mixt_export.compression.recover.settings import RecoverSettings
from mixt_export.optional import require

if TYPE_CHECKING:
    from mixt_export.compression.recover.recipe import compress_and_recover
    from mixt_export.compression.recover.run import recover

__all__ = ["RecoverReport", "RecoverSettings", "compress_and_recover", "recover"]

_HOMES = {"recover": "run", "compress_and_recover": "recipe"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        require("torch", "Recovering a model")
        require("transformers", "Recovering a model")
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
