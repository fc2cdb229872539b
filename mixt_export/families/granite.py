"""Granite: Llama wiring with four multipliers: of embeddings, scores, what a block adds to the stream, and logits."""

from __future__ import annotations

from dataclasses import replace

from mixt_export.families.config import Config, flag, number
from mixt_export.families.gated import gated_decoder
from mixt_export.families.wiring import Block, Decoder


def decoder(config: Config) -> Decoder:
    """Wiring of a GraniteForCausalLM."""
    bias, mlp_bias = flag(config, "attention_bias"), flag(config, "mlp_bias")
    plain = gated_decoder(config, qkv_bias=bias, o_bias=bias, mlp_bias=mlp_bias, kv_heads_default_to_heads=True)
    scale, branch = number(config, "attention_multiplier", 1.0), number(config, "residual_multiplier", 1.0)

    def multiplied(block: Block) -> Block:
        return replace(block, attention=replace(block.attention, scale=scale), branch_scale=branch)

    return replace(
        plain,
        blocks=tuple(multiplied(block) for block in plain.blocks),
        embedding_scale=number(config, "embedding_multiplier", 1.0),
        logit_scale=1.0 / number(config, "logits_scaling", 1.0),
    )
