"""The sample model (SmolLM2-135M-Instruct from a PyPI wheel) and the shipped texts."""

from __future__ import annotations

from mixt_export.sample.cache import cache_folder
from mixt_export.sample.make import default_output, is_complete, make_sample

__all__ = ["cache_folder", "default_output", "is_complete", "make_sample"]
