"""GPT-2: learned positions, layer norms, q, k and v in one projection, plain MLP, weights stored (in, out)."""

from __future__ import annotations

from mixt_export.errors import CheckpointError, UnsupportedError
from mixt_export.families.config import Config, activation, flag, number, size
from mixt_export.families.gated import layer_count
from mixt_export.families.wiring import Attention, Block, Decoder, LearnedPositions, Linear, Norm, PlainMlp


def decoder(config: Config) -> Decoder:
    """Wiring of a GPT2LMHeadModel.

    Raises UnsupportedError for cross-attention, CheckpointError for sizes that do not fit together.
    """
    if flag(config, "add_cross_attention"):
        raise UnsupportedError("config.json: add_cross_attention is not supported; only decoders alone are.")
    hidden, heads = size(config, "n_embd", 768), size(config, "n_head", 12)
    if hidden % heads:
        raise CheckpointError(f"config.json: n_embd {hidden} is not a multiple of n_head {heads}.")
    ffn, eps = size(config, "n_inner", 4 * hidden), number(config, "layer_norm_epsilon", 1e-5)
    bend = activation(config, "activation_function", "gelu_new")
    head_dim, vocab, positions = hidden // heads, size(config, "vocab_size"), size(config, "n_positions", 1024)
    scale = head_dim**-0.5 if flag(config, "scale_attn_weights", True) else 1.0
    by_layer = flag(config, "scale_attn_by_inverse_layer_idx")

    def conv(name: str, inputs: int, outputs: int) -> Linear:
        return Linear(name, inputs, outputs, bias=True, stored_transposed=True)

    def block(index: int) -> Block:
        prefix = f"transformer.h.{index}"
        return Block(
            index=index,
            prefix=prefix,
            attention=Attention(
                qkv=(conv(f"{prefix}.attn.c_attn", hidden, 3 * hidden),),
                o=conv(f"{prefix}.attn.c_proj", hidden, hidden),
                scale=scale / (index + 1) if by_layer else scale,
                rope=None,
            ),
            mlp=PlainMlp(conv(f"{prefix}.mlp.c_fc", hidden, ffn), conv(f"{prefix}.mlp.c_proj", ffn, hidden), bend),
            attention_norm=layer_norm(f"{prefix}.ln_1", eps),
            mlp_norm=layer_norm(f"{prefix}.ln_2", eps),
        )

    return Decoder(
        model_type="gpt2",
        vocab_size=vocab,
        hidden_size=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        max_positions=positions,
        embedding="transformer.wte.weight",
        final_norm=layer_norm("transformer.ln_f", eps),
        head=None if flag(config, "tie_word_embeddings", True) else Linear("lm_head", hidden, vocab),
        blocks=tuple(block(index) for index in range(layer_count(config, "n_layer"))),
        positions=LearnedPositions("transformer.wpe.weight", positions),
    )


def layer_norm(name: str, eps: float) -> Norm:
    """Layer norm of the module ``name``, with a bias."""
    return Norm(f"{name}.weight", eps, "layer", f"{name}.bias")
