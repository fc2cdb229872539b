"""Modules of runtimes/tensorrt/mixt_trt, which travels as plain files and is not part of the package."""

from __future__ import annotations

from mixt_export.runtime import bundle_folder, toolkit

__all__ = ["bundle_folder", "toolkit"]
