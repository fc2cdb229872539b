"""Import optional dependencies late, with a sentence that names the extra to install."""

from __future__ import annotations

import importlib
from types import ModuleType

from mixt_export.errors import MissingDependencyError

_EXTRA_OF = {
    "torch": "torch",
    "transformers": "torch",
    "gguf": "sample",
    "onnxruntime_genai": "genai",
    "tensorrt_rtx": "rtx",
    "tensorrt": "trt",
    "triton": "kernels",
    "matplotlib": "report",
}


def require(module: str, purpose: str) -> ModuleType:
    """Import and return ``module``.

    Raises MissingDependencyError naming the extra when it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        extra = _EXTRA_OF[module.split(".")[0]]
        raise MissingDependencyError(
            f"{purpose} needs the Python package {module.split('.')[0]!r}, which is not installed: "
            f"pip install 'mixt-export[{extra}]'."
        ) from error
