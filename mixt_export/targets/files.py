"""Files of an exported folder, and the bytes of a graph's weights."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from mixt_export.checkpoints import Checkpoint
from mixt_export.lower import LoweredModel
from mixt_export.lower.weights import STREAMED_FILE, write_streamed
from mixt_export.progress import Progress
from mixt_export.resources import resource
from mixt_export.staging import link_or_copy, require_space

GRAPH_FILE = "model.onnx"


def write_model(
    checkpoint: Checkpoint,
    lowered: LoweredModel,
    device_files: str | None,
    folder: Path,
    digests: Mapping[str, str],
    progress: Progress,
) -> tuple[bool, dict[str, dict[str, Any]]]:
    """Write graph, weights, companions and the device files (a folder under runtimes/) into ``folder``.

    ``digests``: SHA-256 of the checkpoint's weight files. Returns whether every one of them could be hardlinked, and
    bytes and SHA-256 of the files that hold graph or weights. Raises ResourceError without space.
    """
    weights = lowered.weights
    linked = [place(path, folder) for path in sorted(weights.linked)]
    write_streamed(weights, folder, progress)
    ir.save(lowered.model, folder / GRAPH_FILE)
    (folder / "config.json").write_bytes(checkpoint.config_bytes())
    for path in checkpoint.companions():
        shutil.copyfile(path, folder / path.name)
    if device_files is not None:
        source = resource("runtimes") / device_files
        shutil.copytree(source, folder / "device", ignore=shutil.ignore_patterns("__*"))
    files = {path.name: {"bytes": path.stat().st_size, "sha256": digests[path.name]} for path in weights.linked}
    for name in (GRAPH_FILE, STREAMED_FILE):
        if (folder / name).is_file():
            files[name] = facts(folder / name)
    return all(linked), files


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


def facts(path: Path) -> dict[str, Any]:
    """What a manifest says of a file: bytes and SHA-256."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented UTF-8 JSON."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
