"""Qwen2 and Qwen2.5: biases on q, k and v; a sliding window from max_window_layers on if use_sliding_window."""

from __future__ import annotations

from mixt_export.families.config import Config, flag, size
from mixt_export.families.gated import gated_decoder, layer_windows
from mixt_export.families.wiring import Decoder


def decoder(config: Config) -> Decoder:
    """Wiring of a Qwen2ForCausalLM."""
    window = size(config, "sliding_window", 4096) if flag(config, "use_sliding_window") else None
    return gated_decoder(
        config, qkv_bias=True, window_of=layer_windows(config, window, size(config, "max_window_layers", 28))
    )
