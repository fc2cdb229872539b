"""The Hugging Face layout: config.json and model.safetensors, or its shards and their index; or pytorch_model.bin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mixt_export.checkpoints import paths, strictjson
from mixt_export.checkpoints.checkpoint import CONFIG_FILE, Checkpoint
from mixt_export.checkpoints.experts import unstacked
from mixt_export.checkpoints.weights import open_weights, weights_file
from mixt_export.errors import CheckpointError, UnsupportedError

NAME = "huggingface"
#: Largest config.json read.
CONFIG_BYTES = 10_000_000


def recognise(folder: Path) -> str | None:
    """Why ``folder`` is in the Hugging Face layout, or None."""
    name = weights_file(folder)
    return None if name is None else f"{name} beside {CONFIG_FILE}"


def open(folder: Path, reason: str) -> Checkpoint:
    """Open a dense folder; see open_checkpoint."""
    config = read_config(folder)
    return Checkpoint(folder, NAME, reason, config, unstacked(open_weights(folder), config))


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of ``folder``; UnsupportedError for quantised weights."""
    path = paths.required_file(folder, CONFIG_FILE, "copy it from the model's page")
    config = strictjson.load_object(path, limit=CONFIG_BYTES)
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
