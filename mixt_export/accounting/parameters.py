"""Parameters of a variant, and the bytes they need when stored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, prod

from mixt_export.accounting.methods import Variant
from mixt_export.families.wiring import Block, Decoder, Linear, MoeMlp, Norm

GROUP = 128
"""Values along the last axis of a matrix that share one float16 scale in the integer formats."""

_SCALE_BITS = 16

#: Format -> bits of a value of a matrix, whether groups carry a scale.
FORMATS: dict[str, tuple[int, bool]] = {
    "float32": (32, False),
    "float16": (16, False),
    "int8": (8, True),
    "int4": (4, True),
}


@dataclass(frozen=True)
class Parameters:
    """Numbers a model stores. ``linears``: weights of the blocks' linears; ``head`` is 0 when tied."""

    linears: int
    embedding: int
    head: int
    vectors: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.linears + self.embedding + self.head + self.vectors


def count(decoder: Decoder, variant: Variant) -> Parameters:
    """Parameters of ``decoder`` with the linears of ``variant`` replaced; norms and biases are the vectors."""
    return Parameters(
        linears=sum(weights(linear, variant) for block in decoder.blocks for linear in block.linears),
        embedding=sum(prod(shape) for shape in _tables(decoder)),
        head=0 if decoder.head is None else decoder.head.in_features * decoder.head.out_features,
        vectors=sum(size for block in decoder.blocks for size in _vectors(decoder, block)) + _ends(decoder),
    )


def weights(linear: Linear, variant: Variant) -> int:
    """Parameters of one linear without its bias."""
    return sum(prod(shape) for shape in matrices(linear, variant))


def matrices(linear: Linear, variant: Variant) -> list[tuple[int, ...]]:
    """Shapes of the tensors that stand for one linear's weight; a dense one is (out, in)."""
    factors = variant.factors.get(linear.name)
    if factors is None:
        return [(linear.out_features, linear.in_features)]
    return [core.shape for core in factors.core_tensors()]


def storage(decoder: Decoder, variant: Variant) -> dict[str, int]:
    """Bytes of all parameters by format: matrices in the format, vectors (norms, biases) in at least 16 bits."""
    shapes = [shape for block in decoder.blocks for linear in block.linears for shape in matrices(linear, variant)]
    shapes += _tables(decoder)
    if decoder.head is not None:
        shapes.append((decoder.head.out_features, decoder.head.in_features))
    vectors = count(decoder, variant).vectors
    return {
        name: ceil((sum(_bits(shape, *kind) for shape in shapes) + vectors * max(kind[0], 16)) / 8)
        for name, kind in FORMATS.items()
    }


def _bits(shape: tuple[int, ...], bits: int, grouped: bool) -> int:
    """Bits of a matrix; a row's last group may be short and has a scale all the same."""
    scales = prod(shape[:-1]) * ceil(shape[-1] / GROUP) if grouped else 0
    return prod(shape) * bits + scales * _SCALE_BITS


def _vectors(decoder: Decoder, block: Block) -> Iterator[int]:
    yield sum(_norm(norm, decoder.hidden_size) for norm in block.norms)
    if isinstance(block.mlp, MoeMlp):  # a router stays as it is, like a vector
        yield block.mlp.router.in_features * block.mlp.router.out_features
    attention, dim = block.attention, decoder.head_dim
    for norm, heads in ((attention.q_norm, decoder.heads), (attention.k_norm, decoder.kv_heads)):
        if norm is not None:
            yield _norm(norm, dim * heads if attention.norm_all_heads else dim)
    yield sum(linear.out_features for linear in block.linears if linear.bias)


def _norm(norm: Norm, features: int) -> int:
    return features if norm.bias is None else 2 * features


def _tables(decoder: Decoder) -> list[tuple[int, ...]]:
    """Embeddings of tokens, and of positions where they are learned."""
    rows = [decoder.vocab_size, *([] if decoder.positions is None else [decoder.positions.rows])]
    return [(count, decoder.hidden_size) for count in rows]


def _ends(decoder: Decoder) -> int:
    """Vectors behind the last block: final norm, and the head's bias."""
    bias = decoder.vocab_size if decoder.head is not None and decoder.head.bias else 0
    return _norm(decoder.final_norm, decoder.hidden_size) + bias
