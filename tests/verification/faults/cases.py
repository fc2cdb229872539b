"""Small models, exported: what faults are put into."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mixt_export.targets import export
from mixt_export.targets.trt import TrtOptions
from tests.tiny import write_tiny, write_tiny_low_rank, write_tiny_mixt

#: Layer that gets the fault; the tiny models have three.
LAYER = 1

_DENSE: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tied": False},
    "qwen3": {},
    "gemma2": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "gpt2": {},
    "qwen3_moe": {"mlp_only_layers": [0]},
}
_FACTORISED = {"low-rank": write_tiny_low_rank, "mixt": write_tiny_mixt}


def small_model(name: str, root: Path) -> Path:
    """A model folder below ``root``, written once."""
    folder = root / f"model-{name}"
    if not folder.exists():
        if name in _FACTORISED:
            _FACTORISED[name](folder, small_model("llama", root))
        else:
            write_tiny(folder, name, **_DENSE[name])
    return folder


def small_case(case: str, root: Path) -> tuple[Path, Path]:
    """``case``: model, target and perhaps fp16. Returns the model folder and the clean export, written once."""
    name, target, *rest = case.split()
    model = small_model(name, root)
    folder = root / case.replace(" ", "-")
    if not folder.exists():
        typed: dict[str, Any] = {"trt": TrtOptions(scan=False), "dtype": "fp16"} if target == "trt" else {}
        export(model, folder, target=target, **{"dtype": rest[0] if rest else "fp32", **typed}, verify=False)
    return model, folder
