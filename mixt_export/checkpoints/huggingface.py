"""The Hugging Face layout: config.json and model.safetensors, or its shards and their index."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mixt_export.checkpoints import paths, strictjson
from mixt_export.checkpoints.checkpoint import Checkpoint
from mixt_export.checkpoints.experts import unstacked
from mixt_export.checkpoints.store import INDEX_FILE, SINGLE_FILE, open_store
from mixt_export.errors import CheckpointError, UnsupportedError

NAME = "huggingface"
CONFIG_FILE = "config.json"
_CONFIG_BYTES = 10_000_000


def recognise(folder: Path) -> str | None:
    """Why ``folder`` is in the Hugging Face layout, or None."""
    for name in (SINGLE_FILE, INDEX_FILE):
        if (folder / name).exists() or (folder / name).is_symlink():
            return f"{name} beside {CONFIG_FILE}"
    return None


def open(folder: Path, reason: str) -> Checkpoint:
    """Open a dense folder; see open_checkpoint."""
    config = read_config(folder)
    return Checkpoint(folder, NAME, reason, config, unstacked(open_store(folder), config))


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of ``folder``; UnsupportedError for quantised weights."""
    path = paths.required_file(folder, CONFIG_FILE, "copy it from the model's page")
    config = strictjson.load_object(path, limit=_CONFIG_BYTES)
    if not isinstance(config.get("model_type"), str):
        raise CheckpointError(f"{path}: has no model_type; copy config.json from the model's page.")
    quantisation = config.get("quantization_config")
    if quantisation is not None:
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation
        raise UnsupportedError(
            f"{path}: the weights are quantised ({method!r}), which this version does not read; start from the "
            "model's float32, float16 or bfloat16 weights."
        )
    return config
