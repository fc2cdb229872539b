"""Phi-3: q, k and v in one projection, gate and up in one, optionally a part of each head rotating and a window."""

from __future__ import annotations

from dataclasses import replace

from mixt_export.families.config import Config, expect, number, size
from mixt_export.families.gated import decoder_around, gated_attention, read_sizes
from mixt_export.families.rope import read_rope
from mixt_export.families.wiring import Block, Decoder, Linear, Norm, PackedGatedMlp


def decoder(config: Config) -> Decoder:
    """Wiring of a Phi3ForCausalLM; rope_type longrope (the 128k models) is refused with the list of known types."""
    expect(config, "hidden_act", ("silu", "swish"))
    sizes, eps = read_sizes(config, kv_heads_default_to_heads=True), number(config, "rms_norm_eps", 1e-5)
    rope = read_rope(config, sizes.head_dim, partial=True)
    window = None if config.get("sliding_window") is None else size(config, "sliding_window")
    hidden, widths = sizes.hidden, (sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim

    def block(index: int) -> Block:
        prefix = f"model.layers.{index}"
        apart = gated_attention(sizes, prefix, rope)
        return Block(
            index=index,
            prefix=prefix,
            attention=replace(apart, qkv=(Linear(f"{prefix}.self_attn.qkv_proj", hidden, widths),), window=window),
            mlp=PackedGatedMlp(
                Linear(f"{prefix}.mlp.gate_up_proj", hidden, 2 * sizes.ffn),
                Linear(f"{prefix}.mlp.down_proj", sizes.ffn, hidden),
            ),
            attention_norm=Norm(f"{prefix}.input_layernorm.weight", eps),
            mlp_norm=Norm(f"{prefix}.post_attention_layernorm.weight", eps),
        )

    return decoder_around(config, sizes, Norm("model.norm.weight", eps), block)
