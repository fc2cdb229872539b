"""Transformer families: how each is wired, read from config.json. One file per family, one line here."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from mixt_export.errors import CheckpointError, UnsupportedError
from mixt_export.families.wiring import Decoder

#: config.json's model_type -> module with `decoder(config) -> Decoder`.
FAMILIES = {
    "llama": "mixt_export.families.llama",
    "mistral": "mixt_export.families.mistral",
    "qwen2": "mixt_export.families.qwen2",
    "qwen3": "mixt_export.families.qwen3",
}

__all__ = ["FAMILIES", "Decoder", "decoder_of"]


def decoder_of(config: Mapping[str, Any], num_layers: int | None = None) -> Decoder:
    """Wiring of the model that ``config`` (a parsed config.json) describes, cut to ``num_layers`` blocks if given.

    Raises UnsupportedError for a model_type without a family or an unknown variant, CheckpointError for a config
    that contradicts itself.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError("config.json: model_type is missing; this is not a Hugging Face model folder.")
    if model_type not in FAMILIES:
        raise UnsupportedError(
            f"config.json: model_type {model_type!r} is not supported; supported are {', '.join(sorted(FAMILIES))}."
        )
    if config.get("quantization_config"):
        raise UnsupportedError(
            "config.json: the weights are quantised (quantization_config); export the unquantised checkpoint instead."
        )
    decoder: Decoder = importlib.import_module(FAMILIES[model_type]).decoder(config)
    return decoder.first(num_layers) if num_layers is not None else decoder
