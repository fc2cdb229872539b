"""Files of an exported folder, and the bytes of a graph's weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import onnx_ir as ir

from mixt_export.staging import link_or_copy, require_space


def place(path: Path, folder: Path) -> bool:
    """Hardlink ``path`` into ``folder``, or copy it; whether it was linked. Raises ResourceError without space."""
    require_space(folder, path.stat().st_size if path.stat().st_dev != folder.stat().st_dev else 0, path.name)
    return link_or_copy(path, folder / path.name)


def initializer_bytes(model: ir.Model) -> int:
    """Bytes of all initializers of the graph; those that share bytes of a file count once."""
    seen = {}
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None:
            key = (getattr(tensor, "location", value.name), getattr(tensor, "offset", None))
            seen[key] = tensor.nbytes
    return sum(seen.values())


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented UTF-8 JSON."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
