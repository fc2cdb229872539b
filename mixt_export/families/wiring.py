"""What a decoder-only transformer is made of, as data: the families fill it in, the lowering reads it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mixt_export.errors import UsageError
from mixt_export.families.mlps import GatedMlp, Mlp, MoeMlp, PackedGatedMlp, PlainMlp
from mixt_export.families.parts import LearnedPositions, Linear, Norm, Rope

__all__ = [
    "Attention", "Block", "Decoder", "GatedMlp", "LearnedPositions", "Linear", "Mlp", "MoeMlp", "Norm",
    "PackedGatedMlp", "PlainMlp", "Rope",
]  # fmt: skip


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention: softmax(cap(scale · q kᵀ)) v over the keys a query sees.

    ``qkv``: the projections to queries, keys and values, or one whose output is all three side by side. ``rope``: None
    where positions are not rotated in. ``softcap``: c of c · tanh(s / c) on the scaled scores. ``window``: a query sees
    the keys with query - key < window. ``q_norm``, ``k_norm``: on every head, or on all heads at once where
    ``norm_all_heads``.
    """

    qkv: tuple[Linear, ...]
    o: Linear
    scale: float
    rope: Rope | None
    softcap: float | None = None
    window: int | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    norm_all_heads: bool = False

    @property
    def query(self) -> Linear:
        """The linear that makes the queries."""
        return self.qkv[0]

    @property
    def linears(self) -> tuple[Linear, ...]:
        """All linears in the order they run."""
        return (*self.qkv, self.o)


@dataclass(frozen=True)
class Block:
    """One decoder block, pre-norm unless a norm is None; ``post_…`` norms are on what is added to the stream.

    Sequential: m = x + attention(x), y = m + mlp(m). ``parallel``: y = x + attention(x) + mlp(x); then ``mlp_norm``
    None means that the MLP reads what attention reads. ``branch_scale`` multiplies both before they are added.
    """

    index: int
    prefix: str
    attention: Attention
    mlp: Mlp
    attention_norm: Norm | None
    mlp_norm: Norm | None
    post_attention_norm: Norm | None = None
    post_mlp_norm: Norm | None = None
    parallel: bool = False
    branch_scale: float = 1.0

    @property
    def linears(self) -> tuple[Linear, ...]:
        """All linears in the order they run."""
        return (*self.attention.linears, *self.mlp.linears)

    @property
    def writers(self) -> tuple[Linear, ...]:
        """Linears whose outputs are added to the residual stream without a norm in between."""
        attention = (self.attention.o,) if self.post_attention_norm is None else ()
        return (*attention, *(self.mlp.writers if self.post_mlp_norm is None else ()))

    @property
    def norms(self) -> tuple[Norm, ...]:
        """Norms over the hidden features."""
        every = (self.attention_norm, self.post_attention_norm, self.mlp_norm, self.post_mlp_norm)
        return tuple(norm for norm in every if norm is not None)


@dataclass(frozen=True)
class Decoder:
    """A whole model. ``head`` is None when the output projection is the embedding (tied).

    ``embedding_scale`` multiplies the embeddings, ``logit_scale`` the logits, which ``logit_softcap`` then bounds.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    max_positions: int
    embedding: str
    final_norm: Norm
    head: Linear | None
    blocks: tuple[Block, ...]
    positions: LearnedPositions | None = None
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    @property
    def linears(self) -> tuple[Linear, ...]:
        """All linears of all blocks, and the head if it is not tied."""
        body = tuple(linear for block in self.blocks for linear in block.linears)
        return body if self.head is None else (*body, self.head)

    @property
    def ropes(self) -> tuple[Rope, ...]:
        """The different rotary embeddings, in the order of the blocks that use them first."""
        ropes = (block.attention.rope for block in self.blocks)
        return tuple(dict.fromkeys(rope for rope in ropes if rope is not None))

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes of keys and values that one token adds to the cache."""
        return 2 * len(self.blocks) * self.kv_heads * self.head_dim * itemsize

    def first(self, num_layers: int) -> Decoder:
        """The same model cut to its first ``num_layers`` blocks."""
        if not 1 <= num_layers <= len(self.blocks):
            count = len(self.blocks)
            raise UsageError(f"--num-layers {num_layers}: the model has {count} layers; give 1 to {count}.")
        return replace(self, blocks=self.blocks[:num_layers])
