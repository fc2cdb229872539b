"""Gemma: Llama wiring with norms of 1 + w, embeddings times sqrt(hidden), a gated MLP with tanh GELU, tied head.

Also what Gemma 2 and 3 share: every branch of a block is normed before and after ("sandwich").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from mixt_export.errors import UnsupportedError
from mixt_export.families.config import Config, activation, expect, flag, number
from mixt_export.families.gated import Sizes, decoder_around, gated_attention, gated_mlp, read_sizes
from mixt_export.families.rope import read_rope
from mixt_export.families.wiring import Attention, Block, Decoder, Norm

_HEAD_DIM = 256


def decoder(config: Config) -> Decoder:
    """Wiring of a GemmaForCausalLM."""
    refuse_bidirectional(config)
    sizes, eps = gemma_sizes(config), gemma_eps(config)
    rope, bias = read_rope(config, sizes.head_dim), flag(config, "attention_bias")
    # Old folders say "gelu" and mean the tanh form, as transformers reads them.
    expect(config, "hidden_act", ("gelu_pytorch_tanh", "gelu"))

    def block(index: int) -> Block:
        prefix = f"model.layers.{index}"
        return Block(
            index=index,
            prefix=prefix,
            attention=gated_attention(sizes, prefix, rope, qkv_bias=bias, o_bias=bias),
            mlp=gated_mlp(sizes, prefix, activation="gelu_tanh"),
            attention_norm=gemma_norm(f"{prefix}.input_layernorm", eps),
            mlp_norm=gemma_norm(f"{prefix}.post_attention_layernorm", eps),
        )

    return gemma_around(config, sizes, block)


def sandwich_block(config: Config, sizes: Sizes, index: int, attention: Attention) -> Block:
    """A block of Gemma 2 and 3: four norms, GELU from hidden_activation."""
    prefix, eps = f"model.layers.{index}", gemma_eps(config)
    return Block(
        index=index,
        prefix=prefix,
        attention=attention,
        mlp=gated_mlp(sizes, prefix, activation=activation(config, "hidden_activation", "gelu_pytorch_tanh")),
        attention_norm=gemma_norm(f"{prefix}.input_layernorm", eps),
        post_attention_norm=gemma_norm(f"{prefix}.post_attention_layernorm", eps),
        mlp_norm=gemma_norm(f"{prefix}.pre_feedforward_layernorm", eps),
        post_mlp_norm=gemma_norm(f"{prefix}.post_feedforward_layernorm", eps),
    )


def gemma_around(config: Config, sizes: Sizes, block: Callable[[int], Block]) -> Decoder:
    """The decoder around ``block``: scaled embeddings, final norm of 1 + w, head tied unless config.json says not."""
    final = gemma_norm("model.norm", gemma_eps(config))
    plain = decoder_around(config, sizes, final, block, tied_by_default=True)
    return replace(plain, embedding_scale=sizes.hidden**0.5)


def gemma_norm(name: str, eps: float) -> Norm:
    """RMS norm of the module ``name``, scaled by 1 + w."""
    return Norm(f"{name}.weight", eps, offset=1.0)


def gemma_sizes(config: Config) -> Sizes:
    """Sizes; head_dim is 256 unless given."""
    return read_sizes(config, head_dim=_HEAD_DIM)


def gemma_eps(config: Config) -> float:
    """Epsilon of every norm."""
    return number(config, "rms_norm_eps", 1e-6)


def refuse_bidirectional(config: Config) -> None:
    """Raise UnsupportedError for an embedding model: it attends in both directions."""
    if flag(config, "use_bidirectional_attention"):
        raise UnsupportedError(
            "config.json: use_bidirectional_attention makes this an encoder, which is not supported for this family."
        )
