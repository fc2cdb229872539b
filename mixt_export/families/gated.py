"""The wiring that Llama, Mistral, Qwen2 and Qwen3 share: pre-norm blocks, grouped-query attention, gated SiLU MLP."""

from __future__ import annotations

from collections.abc import Callable

from mixt_export.errors import CheckpointError
from mixt_export.families.config import Config, expect, flag, number, size
from mixt_export.families.rope import read_rope
from mixt_export.families.wiring import Block, Decoder, Linear

#: A bound on what config.json claims, so that a corrupt one cannot make us build graphs for hours.
_MOST_LAYERS = 1024


def gated_decoder(
    config: Config,
    *,
    qkv_bias: bool = False,
    o_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    head_dim: int | None = None,
    kv_heads_default_to_heads: bool = False,
    window_of: Callable[[int], int | None] = lambda _layer: None,
) -> Decoder:
    """Decoder with transformers' module names. ``window_of(layer)`` is the sliding window in tokens, or None.

    Raises CheckpointError or UnsupportedError naming the key of config.json.
    """
    expect(config, "hidden_act", ("silu", "swish"))
    hidden = size(config, "hidden_size")
    heads = size(config, "num_attention_heads")
    kv_heads = size(config, "num_key_value_heads", heads if kv_heads_default_to_heads else None)
    ffn = size(config, "intermediate_size")
    if heads % kv_heads:
        raise CheckpointError(
            f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}."
        )
    if head_dim is None and config.get("head_dim") is None and hidden % heads:
        raise CheckpointError(f"config.json: hidden_size {hidden} is not a multiple of num_attention_heads {heads}.")
    dim = size(config, "head_dim", head_dim or hidden // heads)
    if dim % 2:
        raise CheckpointError(f"config.json: head_dim {dim} is odd; rotary embeddings need pairs.")
    vocab = size(config, "vocab_size")

    def block(index: int) -> Block:
        prefix = f"model.layers.{index}"
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        return Block(
            index=index,
            prefix=prefix,
            q=Linear(f"{attention}.q_proj", hidden, heads * dim, qkv_bias),
            k=Linear(f"{attention}.k_proj", hidden, kv_heads * dim, qkv_bias),
            v=Linear(f"{attention}.v_proj", hidden, kv_heads * dim, qkv_bias),
            o=Linear(f"{attention}.o_proj", heads * dim, hidden, o_bias),
            gate=Linear(f"{mlp}.gate_proj", hidden, ffn, mlp_bias),
            up=Linear(f"{mlp}.up_proj", hidden, ffn, mlp_bias),
            down=Linear(f"{mlp}.down_proj", ffn, hidden, mlp_bias),
            input_norm=f"{prefix}.input_layernorm.weight",
            post_attention_norm=f"{prefix}.post_attention_layernorm.weight",
            q_norm=f"{attention}.q_norm.weight" if qk_norm else None,
            k_norm=f"{attention}.k_norm.weight" if qk_norm else None,
            window=window_of(index),
        )

    tied = flag(config, "tie_word_embeddings")
    return Decoder(
        model_type=str(config["model_type"]),
        vocab_size=vocab,
        hidden_size=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=dim,
        norm_eps=number(config, "rms_norm_eps", 1e-6),
        max_positions=size(config, "max_position_embeddings"),
        rope=read_rope(config, dim),
        embedding="model.embed_tokens.weight",
        final_norm="model.norm.weight",
        head=None if tied else Linear("lm_head", hidden, vocab),
        blocks=tuple(block(index) for index in range(_layers(config))),
    )


def layer_windows(config: Config, window: int | None, first_layer: int = 0) -> Callable[[int], int | None]:
    """Sliding window per layer: ``layer_types`` where the config has them, else all layers from ``first_layer`` on."""
    kinds = config.get("layer_types")
    if kinds is not None and (
        not isinstance(kinds, list) or not all(kind in ("full_attention", "sliding_attention") for kind in kinds)
    ):
        raise CheckpointError("config.json: layer_types must list 'full_attention' or 'sliding_attention' per layer.")

    def window_of(layer: int) -> int | None:
        if isinstance(kinds, list):
            if layer >= len(kinds):
                raise CheckpointError(f"config.json: layer_types has {len(kinds)} entries, too few for its layers.")
            return window if kinds[layer] == "sliding_attention" else None
        return window if layer >= first_layer else None

    return window_of


def _layers(config: Config) -> int:
    count = size(config, "num_hidden_layers")
    if count > _MOST_LAYERS:
        raise CheckpointError(f"config.json: num_hidden_layers {count} is beyond any model (at most {_MOST_LAYERS}).")
    return count
