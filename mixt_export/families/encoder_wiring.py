"""What a BERT-like encoder is made of, as data: the families fill it in, the lowering reads it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mixt_export.errors import CheckpointError, UnsupportedError, UsageError
from mixt_export.families.config import Config, number, size
from mixt_export.families.wiring import Linear, Norm, PlainMlp

#: A bound on what config.json claims, so that a corrupt one cannot make us build graphs for hours.
_MOST_LAYERS = 1024


@dataclass(frozen=True)
class EncoderBlock:
    """One post-norm block: m = norm(x + attention(x)), y = norm(m + mlp(m))."""

    index: int
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    attention_norm: Norm
    mlp: PlainMlp
    output_norm: Norm

    @property
    def linears(self) -> tuple[Linear, ...]:
        """All linears in the order they run."""
        return (self.q, self.k, self.v, self.o, *self.mlp.linears)


@dataclass(frozen=True)
class Encoder:
    """A whole model without its pooler or task head; names carry the ``prefix`` the checkpoint uses.

    ``pad_positions``: None where token i has position i, else the
    padding id p of RoBERTa: positions count the tokens that are not p, from p + 1 on, and p itself has position p.
    ``token_types``: rows of the token type embedding; 0 where the family has none.
    """

    model_type: str
    prefix: str
    vocab_size: int
    hidden_size: int
    heads: int
    max_positions: int
    position_rows: int
    pad_positions: int | None
    token_types: int
    word_embedding: str
    position_embedding: str
    token_type_embedding: str
    embedding_norm: Norm
    blocks: tuple[EncoderBlock, ...]

    @property
    def head_dim(self) -> int:
        """Features of a head."""
        return self.hidden_size // self.heads

    @property
    def linears(self) -> tuple[Linear, ...]:
        """All linears of all blocks in the order they run."""
        return tuple(linear for block in self.blocks for linear in block.linears)

    def first(self, num_layers: int) -> Encoder:
        """The same model cut to its first ``num_layers`` blocks."""
        if not 1 <= num_layers <= len(self.blocks):
            count = len(self.blocks)
            raise UsageError(f"--num-layers {num_layers}: the model has {count} layers; give 1 to {count}.")
        return replace(self, blocks=self.blocks[:num_layers])


@dataclass(frozen=True)
class BlockNames:
    """Module names below a block, and below the embeddings' module."""

    layer: str = "encoder.layer"
    q: str = "attention.self.query"
    k: str = "attention.self.key"
    v: str = "attention.self.value"
    o: str = "attention.output.dense"
    attention_norm: str = "attention.output.LayerNorm"
    up: str = "intermediate.dense"
    down: str = "output.dense"
    output_norm: str = "output.LayerNorm"


@dataclass(frozen=True)
class ConfigKeys:
    """What config.json calls the sizes."""

    hidden: str = "hidden_size"
    layers: str = "num_hidden_layers"
    heads: str = "num_attention_heads"
    ffn: str = "intermediate_size"
    activation: str = "hidden_act"


ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def post_norm_encoder(
    config: Config,
    prefix: str,
    *,
    norm_eps: float | None = None,
    pad_positions: int | None = None,
    token_types: int | None = None,
    names: BlockNames = BlockNames(),
    keys: ConfigKeys = ConfigKeys(),
) -> Encoder:
    """Encoder with transformers' module names below ``prefix``.

    norm_eps: None reads layer_norm_eps; token_types: None reads type_vocab_size. Raises CheckpointError or
    UnsupportedError naming the key of config.json.
    """
    hidden, heads, ffn = size(config, keys.hidden), size(config, keys.heads), size(config, keys.ffn)
    if hidden % heads:
        raise CheckpointError(f"config.json: {keys.hidden} {hidden} is not a multiple of {keys.heads} {heads}.")
    layers = size(config, keys.layers)
    if layers > _MOST_LAYERS:
        raise CheckpointError(f"config.json: {keys.layers} {layers} is beyond any model (at most {_MOST_LAYERS}).")

    eps = number(config, "layer_norm_eps", 1e-12) if norm_eps is None else norm_eps
    activation = activation_named(config, keys.activation)

    def norm(module: str) -> Norm:
        return Norm(f"{module}.weight", eps, kind="layer", bias=f"{module}.bias")

    def block(index: int) -> EncoderBlock:
        base = f"{prefix}{names.layer}.{index}"

        def linear(name: str, inputs: int, outputs: int) -> Linear:
            return Linear(f"{base}.{name}", inputs, outputs, bias=True)

        return EncoderBlock(
            index=index,
            q=linear(names.q, hidden, hidden),
            k=linear(names.k, hidden, hidden),
            v=linear(names.v, hidden, hidden),
            o=linear(names.o, hidden, hidden),
            attention_norm=norm(f"{base}.{names.attention_norm}"),
            mlp=PlainMlp(linear(names.up, hidden, ffn), linear(names.down, ffn, hidden), activation),
            output_norm=norm(f"{base}.{names.output_norm}"),
        )

    rows = size(config, "max_position_embeddings", 512)
    usable = rows if pad_positions is None else rows - pad_positions - 1
    if usable < 1:
        raise CheckpointError(
            f"config.json: max_position_embeddings {rows} leaves no position behind pad_token_id {pad_positions}."
        )
    embeddings = f"{prefix}embeddings"
    return Encoder(
        model_type=str(config["model_type"]),
        prefix=prefix,
        vocab_size=size(config, "vocab_size"),
        hidden_size=hidden,
        heads=heads,
        max_positions=usable,
        position_rows=rows,
        pad_positions=pad_positions,
        token_types=size(config, "type_vocab_size", 2) if token_types is None else token_types,
        word_embedding=f"{embeddings}.word_embeddings.weight",
        position_embedding=f"{embeddings}.position_embeddings.weight",
        token_type_embedding=f"{embeddings}.token_type_embeddings.weight",
        embedding_norm=norm(f"{embeddings}.LayerNorm"),
        blocks=tuple(block(index) for index in range(layers)),
    )


def activation_named(config: Config, key: str) -> str:
    """Our name of the activation that config.json calls for. Raises UnsupportedError for another one."""
    value = config.get(key, "gelu")
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise UnsupportedError(
            f"config.json: {key} = {value!r} is not supported; supported are {', '.join(ACTIVATIONS)}."
        )
    return ACTIVATIONS[value]
