"""What a decoder-only transformer is made of, as data: the families fill it in, the lowering reads it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mixt_export.errors import UsageError


@dataclass(frozen=True)
class Linear:
    """A linear layer: module name as in transformers (no ``.weight``), sizes, and whether it has a bias."""

    name: str
    in_features: int
    out_features: int
    bias: bool = False


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: base frequency and the scaling rule with its parameters (see families/rope.py)."""

    theta: float
    rotary_dim: int
    kind: str = "default"
    parameters: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Block:
    """One pre-norm decoder block with grouped-query attention and a gated MLP (SiLU)."""

    index: int
    prefix: str
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    gate: Linear
    up: Linear
    down: Linear
    input_norm: str
    post_attention_norm: str
    q_norm: str | None = None
    k_norm: str | None = None
    window: int | None = None

    @property
    def linears(self) -> tuple[Linear, ...]:
        """All linears in the order they run."""
        return (self.q, self.k, self.v, self.o, self.gate, self.up, self.down)


@dataclass(frozen=True)
class Decoder:
    """A whole model. ``head`` is None when the output projection is the embedding (tied)."""

    model_type: str
    vocab_size: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    max_positions: int
    rope: Rope
    embedding: str
    final_norm: str
    head: Linear | None
    blocks: tuple[Block, ...]

    @property
    def linears(self) -> tuple[Linear, ...]:
        """All linears of all blocks, and the head if it is not tied."""
        body = tuple(linear for block in self.blocks for linear in block.linears)
        return body if self.head is None else (*body, self.head)

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes of keys and values that one token adds to the cache."""
        return 2 * len(self.blocks) * self.kv_heads * self.head_dim * itemsize

    def first(self, num_layers: int) -> Decoder:
        """The same model cut to its first ``num_layers`` blocks."""
        if not 1 <= num_layers <= len(self.blocks):
            count = len(self.blocks)
            raise UsageError(f"--num-layers {num_layers}: the model has {count} layers; give 1 to {count}.")
        return replace(self, blocks=self.blocks[:num_layers])
