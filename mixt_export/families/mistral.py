"""Mistral: Llama wiring, optionally with a sliding attention window in every layer."""

from __future__ import annotations

from mixt_export.families.config import Config, size
from mixt_export.families.gated import gated_decoder
from mixt_export.families.wiring import Decoder

#: transformers' MistralConfig: an absent key means this window, an explicit null means none.
_DEFAULT_WINDOW = 4096


def decoder(config: Config) -> Decoder:
    """Wiring of a MistralForCausalLM."""
    no_window = "sliding_window" in config and config["sliding_window"] is None
    window = None if no_window else size(config, "sliding_window", _DEFAULT_WINDOW)
    return gated_decoder(config, window_of=lambda _layer: window)
