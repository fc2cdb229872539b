"""StarCoder2: layer norms, grouped queries with rotary positions, a plain GELU MLP, biases, optionally a window."""

from __future__ import annotations

from dataclasses import replace

from mixt_export.families.config import Config, activation, flag, number, size
from mixt_export.families.gated import decoder_around, gated_attention, read_sizes
from mixt_export.families.gpt2 import layer_norm
from mixt_export.families.rope import read_rope
from mixt_export.families.wiring import Block, Decoder, Linear, PlainMlp


def decoder(config: Config) -> Decoder:
    """Wiring of a Starcoder2ForCausalLM."""
    sizes, eps = read_sizes(config), number(config, "norm_epsilon", 1e-5)
    rope, bias = read_rope(config, sizes.head_dim), flag(config, "use_bias", True)
    window = None if config.get("sliding_window") is None else size(config, "sliding_window")
    bend = activation(config, "hidden_act", "gelu_pytorch_tanh")

    def block(index: int) -> Block:
        prefix = f"model.layers.{index}"
        attention = gated_attention(sizes, prefix, rope, qkv_bias=bias, o_bias=bias)
        return Block(
            index=index,
            prefix=prefix,
            attention=replace(attention, window=window),
            mlp=PlainMlp(
                Linear(f"{prefix}.mlp.c_fc", sizes.hidden, sizes.ffn, bias),
                Linear(f"{prefix}.mlp.c_proj", sizes.ffn, sizes.hidden, bias),
                bend,
            ),
            attention_norm=layer_norm(f"{prefix}.input_layernorm", eps),
            mlp_norm=layer_norm(f"{prefix}.post_attention_layernorm", eps),
        )

    return decoder_around(config, sizes, layer_norm("model.norm", eps), block, tied_by_default=True)
