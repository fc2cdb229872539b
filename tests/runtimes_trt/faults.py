"""Change a weight of an exported graph, keeping the manifest consistent, as a wrong kernel would change a result."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper


def change_weight(folder: Path, part: str, factor: float = 1.5) -> str:
    """Scale the largest initializer whose name holds ``part``; golden tensors stay. Returns its name."""
    model = onnx.load(folder / "model.onnx")
    found = [tensor for tensor in model.graph.initializer if part in tensor.name]
    tensor = max(found, key=lambda candidate: int(np.prod(candidate.dims)))
    values = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array((values * factor).astype(values.dtype), tensor.name))
    onnx.save(model, folder / "model.onnx")
    restamp(folder)
    return tensor.name


def restamp(folder: Path) -> None:
    """Make manifest and golden record agree with the model.onnx that lies there, which holds all weights."""
    digest = hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest()
    manifest = json.loads((folder / "mixt_manifest.json").read_text())
    manifest["files"] = {"model.onnx": {"sha256": digest}}
    (folder / "mixt_manifest.json").write_text(json.dumps(manifest))
    path = folder / "device" / "golden" / "golden.json"
    golden = json.loads(path.read_text())
    path.write_text(json.dumps(golden | {"graph": digest}))
