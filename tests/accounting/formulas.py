"""The papers' formulas, written again: sizes of each linear of a Llama-like block, and what MixT makes of them."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """Sizes of a decoder with a gated MLP; ``head_dim`` and ``kv`` as transformers has them."""

    hidden: int
    ffn: int
    blocks: int
    heads: int
    kv: int
    head_dim: int
    vocab: int
    tied: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False

    def linears(self) -> list[tuple[int, int]]:
        """(out, in) of q, k, v, o, gate, up, down."""
        h, f, q, k = self.hidden, self.ffn, self.heads * self.head_dim, self.kv * self.head_dim
        return [(q, h), (k, h), (k, h), (h, q), (f, h), (f, h), (h, f)]

    def dense_block(self) -> int:
        return sum(o * i for o, i in self.linears())

    def total(self) -> int:
        norms = 2 * self.hidden + (2 * self.head_dim if self.qk_norm else 0)
        biases = (self.heads + 2 * self.kv) * self.head_dim if self.qkv_bias else 0
        return (
            self.vocab * self.hidden * (1 if self.tied else 2)
            + self.blocks * (self.dense_block() + norms + biases)
            + self.hidden
        )


#: From the models' public config.json, with the parameter counts their pages state.
SHAPES: dict[str, tuple[Shape, int]] = {
    "llama2-7b": (Shape(4096, 11008, 32, 32, 32, 128, 32000), 6_738_415_616),
    "llama2-13b": (Shape(5120, 13824, 40, 40, 40, 128, 32000), 13_015_864_320),
    "llama3.1-8b": (Shape(4096, 14336, 32, 32, 8, 128, 128256), 8_030_261_248),
    "llama3.2-1b": (Shape(2048, 8192, 16, 32, 8, 64, 128256, tied=True), 1_235_814_400),
    "tinyllama-1.1b": (Shape(2048, 5632, 22, 32, 4, 64, 32000), 1_100_048_384),
    "smollm2-135m": (Shape(576, 1536, 30, 9, 3, 64, 49152, tied=True), 134_515_008),
    "smollm2-360m": (Shape(960, 2560, 32, 15, 5, 64, 49152, tied=True), 361_821_120),
    "smollm2-1.7b": (Shape(2048, 8192, 24, 32, 32, 64, 49152, tied=True), 1_711_376_384),
    "mistral-7b": (Shape(4096, 14336, 32, 32, 8, 128, 32768), 7_248_023_552),
    "qwen2.5-7b": (Shape(3584, 18944, 28, 28, 4, 128, 152064, qkv_bias=True), 7_615_616_512),
    "qwen3-0.6b": (Shape(1024, 3072, 28, 16, 8, 128, 151936, tied=True, qk_norm=True), 596_049_920),
    "qwen3-8b": (Shape(4096, 12288, 36, 32, 8, 128, 151936, qk_norm=True), 8_190_735_360),
}


def log2_up(features: int) -> int:
    """Bonds of dimension 2 that hold ``features``."""
    return (features - 1).bit_length()


def padded_params(out: int, inside: int, terms: int) -> int:
    """N_T · 2^(m + n + 2 - 2 N_T), Eq. 2's numerator."""
    return terms * 2 ** (log2_up(out) + log2_up(inside) + 2 - 2 * terms)


def exact_params(out: int, inside: int, terms: int) -> int:
    """N_T · (out/S) · (in/S)."""
    spectators = 2 ** (terms - 1)
    return terms * (out // spectators) * (inside // spectators)


def padded_macs(out: int, inside: int, terms: int) -> int:
    """N_T · 2^(m + n - N_T + 1): every core meets all S slices."""
    return terms * 2 ** (log2_up(out) + log2_up(inside) - terms + 1)


def share_of_support(terms: int) -> float:
    """[N S - (N - 1) S / 2] / S²."""
    spectators = 2 ** (terms - 1)
    return (terms * spectators - (terms - 1) * spectators / 2) / spectators**2
