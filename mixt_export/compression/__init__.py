"""Compression: dense model folder in, factorised model folder out.

Imports lazily: ``compress`` and ``plan`` need torch and transformers, the registries and settings nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mixt_export.compression.method import METHODS, OBJECTIVES
from mixt_export.compression.report import CompressionReport, LayerReport, TextReport
from mixt_export.compression.settings import Settings
from mixt_export.optional import require

if TYPE_CHECKING:
    from mixt_export.compression.job import Plan
    from mixt_export.compression.run import compress, plan

__all__ = [
    "METHODS",
    "OBJECTIVES",
    "CompressionReport",
    "LayerReport",
    "Plan",
    "Settings",
    "TextReport",
    "compress",
    "plan",
]


def __getattr__(name: str) -> Any:
    if name in ("compress", "plan", "Plan"):
        require("torch", "Compressing a model")
        require("transformers", "Compressing a model")
        return getattr(importlib.import_module("mixt_export.compression.run"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
