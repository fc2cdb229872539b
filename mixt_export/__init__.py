"""mixt-export: compile, export and prove tensor-compressed language models for edge devices.

The Python API mirrors the command line and imports lazily: ``mixt_export.compress``, ``mixt_export.recover``,
``mixt_export.export``, ``mixt_export.verify``, ``mixt_export.convert``, ``mixt_export.load_reference``,
``mixt_export.open_checkpoint``.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_LAZY = {
    "open_checkpoint": "mixt_export.checkpoints",
    "load_reference": "mixt_export.reference",
    "convert": "mixt_export.checkpoints.convert",
    "compress": "mixt_export.compression",
    "recover": "mixt_export.compression.recover",
    "export": "mixt_export.targets",
    "verify": "mixt_export.verification",
}

__all__ = [*sorted(_LAZY), "__version__"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
