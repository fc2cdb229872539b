"""The table of targets."""

from __future__ import annotations

from dataclasses import dataclass

from mixt_export.errors import UsageError
from mixt_export.lower.dialects import DIALECTS, Dialect


@dataclass(frozen=True)
class Target:
    """A kind of exported folder: the graph's dialect, whether ONNX Runtime GenAI can load it, the device files."""

    name: str
    dialect: Dialect
    genai: bool
    device_files: str | None
    """Folder under runtimes/ that is copied to OUT/device, or None."""


TARGETS = {
    target.name: target
    for target in (
        Target("ort", DIALECTS["ort"], genai=True, device_files="ort"),
        Target("onnx", DIALECTS["portable"], genai=False, device_files="ort"),
    )
}

#: Accepted spellings of dtypes -> numpy name.
EXPORT_DTYPES = {"fp32": "float32", "float32": "float32", "fp16": "float16", "float16": "float16"}


def target_named(name: str) -> Target:
    """The target called ``name``; UsageError lists what there is."""
    if name not in TARGETS:
        raise UsageError(f"--target {name}: not a target of this version; choose from {', '.join(sorted(TARGETS))}.")
    return TARGETS[name]


def dtype_named(name: str) -> str:
    """Numpy name of the dtype ``name``; UsageError lists what there is."""
    if name not in EXPORT_DTYPES:
        raise UsageError(f"--dtype {name}: not a dtype of this version; choose from fp32, fp16.")
    return EXPORT_DTYPES[name]
