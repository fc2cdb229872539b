"""Qwen3 (dense): RMS norm on every head's query and key, head_dim of its own, optional biases."""

from __future__ import annotations

from mixt_export.families.config import Config, flag, size
from mixt_export.families.gated import gated_decoder, layer_windows
from mixt_export.families.wiring import Decoder


def decoder(config: Config) -> Decoder:
    """Wiring of a Qwen3ForCausalLM."""
    bias = flag(config, "attention_bias")
    window = size(config, "sliding_window", 4096) if flag(config, "use_sliding_window") else None
    return gated_decoder(
        config,
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=True,
        head_dim=128,
        window_of=layer_windows(config, window, size(config, "max_window_layers", 28)),
    )
