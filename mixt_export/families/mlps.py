"""What a block computes per token, as data: one dataclass per kind of MLP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from mixt_export.families.parts import Linear


class Mlp(Protocol):
    """What a block computes per token; how each kind is lowered stands in lower/mlp."""

    @property
    def linears(self) -> tuple[Linear, ...]:
        """All linears in the order they run."""
        ...

    @property
    def writers(self) -> tuple[Linear, ...]:
        """Those whose outputs make up what the MLP returns."""
        ...


@dataclass(frozen=True)
class GatedMlp:
    """down(activation(gate(x)) · up(x)); ``activation`` is a key of lower.mlp.activations.ACTIVATIONS."""

    gate: Linear
    up: Linear
    down: Linear
    activation: str = "silu"

    @property
    def linears(self) -> tuple[Linear, ...]:
        """See Mlp.linears."""
        return (self.gate, self.up, self.down)

    @property
    def writers(self) -> tuple[Linear, ...]:
        """See Mlp.writers."""
        return (self.down,)


@dataclass(frozen=True)
class PackedGatedMlp:
    """down(activation(g) · u) where ``gate_up`` makes g and u side by side (Phi-3)."""

    gate_up: Linear
    down: Linear
    activation: str = "silu"

    @property
    def linears(self) -> tuple[Linear, ...]:
        """See Mlp.linears."""
        return (self.gate_up, self.down)

    @property
    def writers(self) -> tuple[Linear, ...]:
        """See Mlp.writers."""
        return (self.down,)


@dataclass(frozen=True)
class PlainMlp:
    """down(activation(up(x))); ``activation`` is a key of lower.mlp.activations.ACTIVATIONS."""

    up: Linear
    down: Linear
    activation: str

    @property
    def linears(self) -> tuple[Linear, ...]:
        """See Mlp.linears."""
        return (self.up, self.down)

    @property
    def writers(self) -> tuple[Linear, ...]:
        """See Mlp.writers."""
        return (self.down,)


@dataclass(frozen=True)
class MoeMlp:
    """Mixture of experts: the sum of the ``top_k`` experts that a router scores highest, each times its weight.

    Scores are softmax(router(x)) in float32 over all experts; the chosen ones are divided by their sum where
    ``normalised``. ``experts`` are alike in sizes and activation. The router is no linear that factors could replace.
    """

    router: Linear
    experts: tuple[GatedMlp, ...]
    top_k: int
    normalised: bool

    @property
    def kinds(self) -> tuple[tuple[Linear, ...], tuple[Linear, ...], tuple[Linear, ...]]:
        """Gate, up and down of every expert."""
        experts = self.experts
        return tuple(e.gate for e in experts), tuple(e.up for e in experts), tuple(e.down for e in experts)

    @property
    def linears(self) -> tuple[Linear, ...]:
        """See Mlp.linears: the gates of all experts, the ups, the downs."""
        return tuple(linear for kind in self.kinds for linear in kind)

    @property
    def writers(self) -> tuple[Linear, ...]:
        """See Mlp.writers."""
        return self.kinds[2]
