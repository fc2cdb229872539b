"""The smallest parts of a model as data: linears, norms, positions."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Linear:
    """A linear layer: module name as in transformers (no ``.weight``), sizes, and whether it has a bias.

    ``stored_transposed``: its dense weight is stored (in, out), as transformers' Conv1D does, not (out, in).
    """

    name: str
    in_features: int
    out_features: int
    bias: bool = False
    stored_transposed: bool = False

    @property
    def stored_shape(self) -> tuple[int, int]:
        """Shape of the dense weight in the checkpoint."""
        sizes = (self.out_features, self.in_features)
        return sizes[::-1] if self.stored_transposed else sizes


@dataclass(frozen=True)
class Norm:
    """A norm over the last axis: names of its tensors, ``kind`` "rms" or "layer", ``eps``.

    The scale is ``offset`` + the stored weight (Gemma stores w of 1 + w).
    """

    weight: str
    eps: float
    kind: str = "rms"
    bias: str | None = None
    offset: float = 0.0

    @property
    def stem(self) -> str:
        """Name of the module in its parent, e.g. ``input_layernorm``."""
        return self.weight.rsplit(".", 2)[-2]


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: base frequency and the scaling rule with its parameters (see families/rope.py).

    ``rotary_dim``: how many of a head's first features rotate. ``interleaved``: neighbours 2i, 2i+1 are a pair (GPT-J);
    otherwise i and i + rotary_dim / 2 are.
    """

    theta: float
    rotary_dim: int
    kind: str = "default"
    parameters: tuple[tuple[str, float], ...] = ()
    interleaved: bool = False


@dataclass(frozen=True)
class LearnedPositions:
    """A table of ``rows`` embeddings added to the tokens', one per position."""

    weight: str
    rows: int
