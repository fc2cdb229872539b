"""Transformer families: how each is wired, read from config.json. One file per family, one line here."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from mixt_export.errors import CheckpointError, UnsupportedError
from mixt_export.families.wiring import Decoder

#: config.json's model_type -> module with `decoder(config) -> Decoder`.
FAMILIES = {
    "gemma": "mixt_export.families.gemma",
    "gemma2": "mixt_export.families.gemma2",
    "gemma3_text": "mixt_export.families.gemma3",
    "gpt2": "mixt_export.families.gpt2",
    "gptj": "mixt_export.families.gptj",
    "granite": "mixt_export.families.granite",
    "llama": "mixt_export.families.llama",
    "mistral": "mixt_export.families.mistral",
    "olmo2": "mixt_export.families.olmo2",
    "phi3": "mixt_export.families.phi3",
    "qwen2": "mixt_export.families.qwen2",
    "qwen3": "mixt_export.families.qwen3",
    "qwen3_moe": "mixt_export.families.qwen3_moe",
    "smollm3": "mixt_export.families.smollm3",
    "starcoder2": "mixt_export.families.starcoder2",
}

#: model_type -> what to do about a folder of that type, which holds more than a decoder.
_REFUSED = {
    "gemma3": "it is text and vision in one; save its language model alone, as a Gemma3ForCausalLM (gemma3_text)",
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
    if model_type in _REFUSED:
        raise UnsupportedError(f"config.json: model_type {model_type!r} is not supported: {_REFUSED[model_type]}.")
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
