"""Load modules of runtimes/tensorrt/mixt_trt, which travels as plain files and is not part of the package."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from mixt_export.errors import MixtError
from mixt_export.resources import resource

_PACKAGE = "mixt_trt"


def bundle_folder() -> Path:
    """The scripts that are copied to OUT/device."""
    return resource("runtimes") / "tensorrt"


def toolkit(module: str) -> Any:
    """Module ``mixt_trt.<module>``, the same object on every call and the one that the device scripts use."""
    if _PACKAGE not in sys.modules:
        path = bundle_folder() / _PACKAGE / "__init__.py"
        spec = importlib.util.spec_from_file_location(_PACKAGE, path, submodule_search_locations=[str(path.parent)])
        if spec is None or spec.loader is None or not path.is_file():
            raise MixtError(f"{path}: cannot be loaded as a Python package; reinstall mixt-export.")
        package = importlib.util.module_from_spec(spec)
        sys.modules[_PACKAGE] = package
        spec.loader.exec_module(package)
    return importlib.import_module(f"{_PACKAGE}.{module}")
