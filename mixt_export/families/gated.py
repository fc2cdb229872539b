"""What Llama and its kin share: RMS norms, grouped-query attention, gated MLP, and the names of their modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from mixt_export.errors import CheckpointError
from mixt_export.families.config import Config, expect, flag, number, size
from mixt_export.families.rope import read_rope
from mixt_export.families.wiring import Attention, Block, Decoder, GatedMlp, Linear, Mlp, Norm, Rope

#: A bound on what config.json claims, so that a corrupt one cannot make us build graphs for hours.
_MOST_LAYERS = 1024


@dataclass(frozen=True)
class Sizes:
    """What config.json says about sizes, checked against each other."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    layers: int


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
    mlp_of: Callable[[int], Mlp | None] = lambda _layer: None,
) -> Decoder:
    """Decoder with transformers' module names. ``window_of(layer)`` is the sliding window in tokens, or None.

    ``mlp_of(layer)``: another MLP than the gated one, or None. Raises CheckpointError or UnsupportedError naming the
    key of config.json.
    """
    expect(config, "hidden_act", ("silu", "swish"))
    sizes = read_sizes(config, head_dim=head_dim, kv_heads_default_to_heads=kv_heads_default_to_heads)
    rope = read_rope(config, sizes.head_dim)
    eps = number(config, "rms_norm_eps", 1e-6)

    def block(index: int) -> Block:
        prefix = f"model.layers.{index}"
        attention = gated_attention(sizes, prefix, rope, qkv_bias=qkv_bias, o_bias=o_bias)
        if qk_norm:
            names = (f"{prefix}.self_attn.q_norm.weight", f"{prefix}.self_attn.k_norm.weight")
            attention = replace(attention, q_norm=Norm(names[0], eps), k_norm=Norm(names[1], eps))
        return Block(
            index=index,
            prefix=prefix,
            attention=replace(attention, window=window_of(index)),
            mlp=mlp_of(index) or gated_mlp(sizes, prefix, bias=mlp_bias),
            attention_norm=Norm(f"{prefix}.input_layernorm.weight", eps),
            mlp_norm=Norm(f"{prefix}.post_attention_layernorm.weight", eps),
        )

    return decoder_around(config, sizes, Norm("model.norm.weight", eps), block)


def read_sizes(config: Config, *, head_dim: int | None = None, kv_heads_default_to_heads: bool = False) -> Sizes:
    """Sizes under Llama's keys; ``head_dim``: the family's own default, else hidden_size / num_attention_heads.

    Raises CheckpointError for a missing key and for sizes that do not fit together.
    """
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
    return Sizes(hidden, heads, kv_heads, dim, ffn, vocab, layer_count(config))


def gated_attention(
    sizes: Sizes, prefix: str, rope: Rope | None, *, qkv_bias: bool = False, o_bias: bool = False
) -> Attention:
    """Attention of the block ``prefix`` with q_proj, k_proj, v_proj and o_proj, scaled by head_dim^-0.5."""
    name, hidden, dim = f"{prefix}.self_attn", sizes.hidden, sizes.head_dim
    return Attention(
        qkv=(
            Linear(f"{name}.q_proj", hidden, sizes.heads * dim, qkv_bias),
            Linear(f"{name}.k_proj", hidden, sizes.kv_heads * dim, qkv_bias),
            Linear(f"{name}.v_proj", hidden, sizes.kv_heads * dim, qkv_bias),
        ),
        o=Linear(f"{name}.o_proj", sizes.heads * dim, hidden, o_bias),
        scale=dim**-0.5,
        rope=rope,
    )


def gated_mlp(sizes: Sizes, prefix: str, *, bias: bool = False, activation: str = "silu") -> GatedMlp:
    """MLP of the block ``prefix`` with gate_proj, up_proj and down_proj."""
    name = f"{prefix}.mlp"
    return GatedMlp(
        gate=Linear(f"{name}.gate_proj", sizes.hidden, sizes.ffn, bias),
        up=Linear(f"{name}.up_proj", sizes.hidden, sizes.ffn, bias),
        down=Linear(f"{name}.down_proj", sizes.ffn, sizes.hidden, bias),
        activation=activation,
    )


def decoder_around(
    config: Config, sizes: Sizes, final_norm: Norm, block: Callable[[int], Block], *, tied_by_default: bool = False
) -> Decoder:
    """Blocks between model.embed_tokens and lm_head; what else a family has it adds with dataclasses.replace."""
    tied = flag(config, "tie_word_embeddings", tied_by_default)
    return Decoder(
        model_type=str(config["model_type"]),
        vocab_size=sizes.vocab,
        hidden_size=sizes.hidden,
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        max_positions=size(config, "max_position_embeddings"),
        embedding="model.embed_tokens.weight",
        final_norm=final_norm,
        head=None if tied else Linear("lm_head", sizes.hidden, sizes.vocab),
        blocks=tuple(block(index) for index in range(sizes.layers)),
    )


def layer_windows(config: Config, window: int | None, first_layer: int = 0) -> Callable[[int], int | None]:
    """Sliding window per layer: ``layer_types`` where the config has them, else all layers from ``first_layer`` on."""
    kinds = _given_kinds(config)

    def window_of(layer: int) -> int | None:
        if kinds is None:
            return window if layer >= first_layer else None
        if layer >= len(kinds):
            raise CheckpointError(f"config.json: layer_types has {len(kinds)} entries, too few for its layers.")
        return window if kinds[layer] == "sliding_attention" else None

    return window_of


def layer_kinds(config: Config, layers: int, pattern: int) -> list[str]:
    """ "sliding_attention" or "full_attention" per layer; by default every ``pattern``-th layer is full.

    Raises CheckpointError for a list of another length.
    """
    kinds = _given_kinds(config)
    if kinds is None:
        return ["sliding_attention" if (layer + 1) % pattern else "full_attention" for layer in range(layers)]
    if len(kinds) != layers:
        raise CheckpointError(f"config.json: layer_types has {len(kinds)} entries for {layers} layers.")
    return kinds


def _given_kinds(config: Config) -> list[str] | None:
    kinds = config.get("layer_types")
    if kinds is None:
        return None
    if not isinstance(kinds, list) or not all(kind in ("full_attention", "sliding_attention") for kind in kinds):
        raise CheckpointError("config.json: layer_types must list 'full_attention' or 'sliding_attention' per layer.")
    return kinds


def layer_count(config: Config, key: str = "num_hidden_layers") -> int:
    """Number of blocks. Raises CheckpointError where it is beyond any model."""
    count = size(config, key)
    if count > _MOST_LAYERS:
        raise CheckpointError(f"config.json: {key} {count} is beyond any model (at most {_MOST_LAYERS}).")
    return count
