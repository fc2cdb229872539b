"""Gemma 2: sandwich norms, softcapped scores and logits, a sliding window in every other layer from the first on."""

from __future__ import annotations

from dataclasses import replace

from mixt_export.families.config import Config, flag, number, optional_number, size
from mixt_export.families.gated import gated_attention, layer_kinds
from mixt_export.families.gemma import gemma_around, gemma_sizes, refuse_bidirectional, sandwich_block
from mixt_export.families.rope import read_rope
from mixt_export.families.wiring import Block, Decoder


def decoder(config: Config) -> Decoder:
    """Wiring of a Gemma2ForCausalLM."""
    refuse_bidirectional(config)
    sizes = gemma_sizes(config)
    rope, bias = read_rope(config, sizes.head_dim), flag(config, "attention_bias")
    scale = number(config, "query_pre_attn_scalar", 256) ** -0.5
    softcap = optional_number(config, "attn_logit_softcapping", 50.0)
    window = size(config, "sliding_window", 4096)
    kinds = layer_kinds(config, sizes.layers, pattern=2)

    def block(index: int) -> Block:
        attention = replace(
            gated_attention(sizes, f"model.layers.{index}", rope, qkv_bias=bias, o_bias=bias),
            scale=scale,
            softcap=softcap,
            window=window if kinds[index] == "sliding_attention" else None,
        )
        return sandwich_block(config, sizes, index, attention)

    plain = gemma_around(config, sizes, block)
    return replace(plain, logit_softcap=optional_number(config, "final_logit_softcapping", 30.0))
