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
    """Folder under runtimes/ that is copied to OUT/device, or None (trt: building.write_bundle fills it)."""
    dtypes: tuple[str, ...] = ("float32", "float16")


TARGETS = {
    target.name: target
    for target in (
        Target("ort", DIALECTS["ort"], genai=True, device_files="ort"),
        Target("onnx", DIALECTS["portable"], genai=False, device_files="ort"),
        Target("trt", DIALECTS["trt10"], genai=False, device_files=None, dtypes=("float32", "float16", "bfloat16")),
    )
}

#: Accepted spellings of dtypes -> numpy name.
EXPORT_DTYPES = {
    "fp32": "float32",
    "float32": "float32",
    "fp16": "float16",
    "float16": "float16",
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
}


def target_named(name: str) -> Target:
    """The target called ``name``; UsageError lists what there is."""
    if name not in TARGETS:
        raise UsageError(f"--target {name}: not a target of this version; choose from {', '.join(sorted(TARGETS))}.")
    return TARGETS[name]


def dtype_named(name: str, target: Target) -> str:
    """Numpy name of the dtype ``name``; UsageError lists what there is, and what ``target`` takes."""
    if name not in EXPORT_DTYPES:
        raise UsageError(f"--dtype {name}: not a dtype of this version; choose from fp32, fp16, bf16.")
    if EXPORT_DTYPES[name] not in target.dtypes:
        raise UsageError(
            f"--dtype {name}: --target {target.name} takes {' and '.join(target.dtypes)}; "
            "choose one of these, or --target trt."
        )
    return EXPORT_DTYPES[name]
