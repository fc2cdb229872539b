"""OLMo 2: norms behind attention and MLP instead of before them, queries and keys normed over all heads at once."""

from __future__ import annotations

from dataclasses import replace

from mixt_export.families.config import Config, expect, flag, number
from mixt_export.families.gated import decoder_around, gated_attention, gated_mlp, read_sizes
from mixt_export.families.rope import read_rope
from mixt_export.families.wiring import Block, Decoder, Norm


def decoder(config: Config) -> Decoder:
    """Wiring of an Olmo2ForCausalLM."""
    expect(config, "hidden_act", ("silu", "swish"))
    sizes, eps = read_sizes(config, kv_heads_default_to_heads=True), number(config, "rms_norm_eps", 1e-5)
    rope, bias = read_rope(config, sizes.head_dim), flag(config, "attention_bias")

    def block(index: int) -> Block:
        prefix = f"model.layers.{index}"
        return Block(
            index=index,
            prefix=prefix,
            attention=replace(
                gated_attention(sizes, prefix, rope, qkv_bias=bias, o_bias=bias),
                q_norm=Norm(f"{prefix}.self_attn.q_norm.weight", eps),
                k_norm=Norm(f"{prefix}.self_attn.k_norm.weight", eps),
                norm_all_heads=True,
            ),
            mlp=gated_mlp(sizes, prefix),
            attention_norm=None,
            mlp_norm=None,
            post_attention_norm=Norm(f"{prefix}.post_attention_layernorm.weight", eps),
            post_mlp_norm=Norm(f"{prefix}.post_feedforward_layernorm.weight", eps),
        )

    return decoder_around(config, sizes, Norm("model.norm.weight", eps), block)
