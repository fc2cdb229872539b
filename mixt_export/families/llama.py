"""Llama and SmolLM: no query/key norm, optional biases."""

from __future__ import annotations

from mixt_export.families.config import Config, flag
from mixt_export.families.gated import gated_decoder
from mixt_export.families.wiring import Decoder


def decoder(config: Config) -> Decoder:
    """Wiring of a LlamaForCausalLM."""
    bias = flag(config, "attention_bias")
    mlp_bias = flag(config, "mlp_bias")
    return gated_decoder(config, qkv_bias=bias, o_bias=bias, mlp_bias=mlp_bias, kv_heads_default_to_heads=True)
