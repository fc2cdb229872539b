"""GPT-J: attention and MLP side by side on one layer norm, the first features of a head rotate pair by pair."""

from __future__ import annotations

from mixt_export.errors import CheckpointError, UnsupportedError
from mixt_export.families.config import Config, activation, flag, number, size
from mixt_export.families.gated import layer_count
from mixt_export.families.gpt2 import layer_norm
from mixt_export.families.wiring import Attention, Block, Decoder, Linear, PlainMlp, Rope

#: transformers knows no other base for this family (modeling_gptj.create_sinusoidal_positions).
_THETA = 10000.0


def decoder(config: Config) -> Decoder:
    """Wiring of a GPTJForCausalLM; its output head has a bias, its attention none.

    Raises CheckpointError for sizes that do not fit together, UnsupportedError for a tied head.
    """
    hidden, heads = size(config, "n_embd"), size(config, "n_head")
    if hidden % heads:
        raise CheckpointError(f"config.json: n_embd {hidden} is not a multiple of n_head {heads}.")
    if flag(config, "tie_word_embeddings"):
        raise UnsupportedError("config.json: tie_word_embeddings is not supported for gptj: its head has a bias.")
    ffn, eps = size(config, "n_inner", 4 * hidden), number(config, "layer_norm_epsilon", 1e-5)
    head_dim, vocab = hidden // heads, size(config, "vocab_size")
    rotary_dim = size(config, "rotary_dim", 64)
    if rotary_dim > head_dim or rotary_dim % 2:
        raise CheckpointError(
            f"config.json: rotary_dim {rotary_dim} must be an even number up to n_embd / n_head = {head_dim}."
        )
    rope = Rope(theta=_THETA, rotary_dim=rotary_dim, interleaved=True)
    bend = activation(config, "activation_function", "gelu_new")

    def block(index: int) -> Block:
        prefix = f"transformer.h.{index}"
        attention, mlp = f"{prefix}.attn", f"{prefix}.mlp"
        return Block(
            index=index,
            prefix=prefix,
            attention=Attention(
                qkv=tuple(Linear(f"{attention}.{part}_proj", hidden, hidden) for part in "qkv"),
                o=Linear(f"{attention}.out_proj", hidden, hidden),
                scale=head_dim**-0.5,
                rope=rope,
            ),
            mlp=PlainMlp(Linear(f"{mlp}.fc_in", hidden, ffn, True), Linear(f"{mlp}.fc_out", ffn, hidden, True), bend),
            attention_norm=layer_norm(f"{prefix}.ln_1", eps),
            mlp_norm=None,
            parallel=True,
        )

    return Decoder(
        model_type="gptj",
        vocab_size=vocab,
        hidden_size=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        max_positions=size(config, "n_positions", 2048),
        embedding="transformer.wte.weight",
        final_norm=layer_norm("transformer.ln_f", eps),
        head=Linear("lm_head", hidden, vocab, bias=True),
        blocks=tuple(block(index) for index in range(layer_count(config, "n_layer"))),
    )
