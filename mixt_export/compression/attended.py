"""Value projections judged by what heads make of them: their inputs as the attention mixes positions.

An error δ of a value projection reaches the output of a head as δ (A x)_s, A the head's attention weights. What counts
are therefore second moments of A x over queries and heads, and gradients where heads give their result. Moments of x
count every position once, however often it is looked at: first tokens, on which heads rest that look for nothing, are
looked at most and are one in hundreds. A x is found by the block itself, with pieces of x in place of the values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import nn

from mixt_export.compression.blocks import BlockwiseModel
from mixt_export.compression.statistics import Gram, Reached, hooks

#: Last name of a value projection -> of the linear beside it that reads all heads.
_OUTPUTS = {"v_proj": ("o_proj", "out_proj")}


@dataclass(frozen=True)
class Value:
    """The value projection ``name`` of a block, the linear ``output`` that reads the heads, and their sizes."""

    name: str
    output: str
    heads: int
    groups: int
    width: int
    features: int


def values_of(layer: nn.Module, names: Sequence[str]) -> tuple[Value, ...]:
    """The value projections among the linears ``names`` of a block; none where they are fused with others."""
    found = []
    for name in names:
        parent, _, last = name.rpartition(".")
        attention = layer.get_submodule(parent)
        linear, width = layer.get_submodule(name), getattr(attention, "head_dim", None)
        output = next((each for each in _OUTPUTS.get(last, ()) if hasattr(attention, each)), None)
        if output is None or not isinstance(linear, nn.Linear) or not isinstance(width, int):
            continue
        reads = attention.get_submodule(output).in_features
        assert isinstance(reads, int)
        if linear.out_features % width == 0 and reads % linear.out_features == 0:
            heads, groups = reads // width, linear.out_features // width
            found.append(Value(name, f"{parent}.{output}", heads, groups, width, linear.in_features))
    return tuple(found)


@torch.no_grad()
def mixed_gram(
    model: BlockwiseModel, layer: nn.Module, index: int, value: Value, hidden: torch.Tensor, into: Gram
) -> None:
    """Add the rows of A x, (positions · heads, features), for ``hidden`` (windows, length, hidden) to ``into``."""
    caught: list[torch.Tensor] = []

    def hear(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        caught.append(inputs[0].reshape(-1, value.heads, value.width))
        raise Reached

    pieces = _Pieces(value)
    hearing = hooks([layer.get_submodule(value.output).register_forward_pre_hook(hear)])
    with hearing, _in_place_of(layer, value.name, pieces):
        for window in range(len(hidden)):
            for begin in range(0, value.features, value.width):
                pieces.begin = begin
                with suppress(Reached):
                    model.run(layer, index, hidden[window : window + 1])
            mixed = torch.cat(caught, dim=-1)[..., : value.features]
            caught.clear()
            into.add(mixed.reshape(-1, value.features))


class _Pieces(nn.Module):
    """Gives every group of heads the same ``width`` features of its input from ``begin`` on, zeros behind the last."""

    def __init__(self, value: Value) -> None:
        super().__init__()
        self.value, self.begin = value, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        piece = x[..., self.begin : self.begin + self.value.width]
        piece = nn.functional.pad(piece, (0, self.value.width - piece.shape[-1]))
        return piece.repeat(*[1] * (x.ndim - 1), self.value.groups)


@contextmanager
def _in_place_of(layer: nn.Module, name: str, module: nn.Module) -> Iterator[None]:
    parent, _, last = name.rpartition(".")
    owner, kept = layer.get_submodule(parent), layer.get_submodule(name)
    setattr(owner, last, module)
    try:
        yield
    finally:
        setattr(owner, last, kept)


class HeadFisher:
    """mean g gᵀ (out, out) for the gradient g at what heads give: block by block, heads that share values summed."""

    def __init__(self, value: Value) -> None:
        self._value = value
        self._grams = [Gram(value.width) for _ in range(value.groups)]

    def add(self, gradient: torch.Tensor) -> None:
        """Add the rows of ``gradient`` (tokens, heads · width)."""
        apart = gradient.reshape(len(gradient), self._value.groups, -1, self._value.width)
        for group, gram in enumerate(self._grams):
            gram.add(apart[:, group].reshape(-1, self._value.width))

    def mean(self) -> torch.Tensor:
        """Over tokens, summed over the heads of a group, float64."""
        share, width = self._value.heads // self._value.groups, self._value.width
        found = torch.zeros(len(self._grams) * width, len(self._grams) * width, dtype=torch.float64)
        for group, gram in enumerate(self._grams):
            part = slice(group * width, (group + 1) * width)
            found[part, part] = share * gram.mean()
        return found


@contextmanager
def listening_at_heads(
    layer: nn.Module, values: Sequence[Value], hear: Callable[[str, torch.Tensor], None]
) -> Iterator[None]:
    """While open, ``hear(name, g)`` gets gradients (tokens, heads · width) at what heads give, in a backward pass."""

    def listener(name: str) -> Callable[..., None]:
        def attach(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            inputs[0].register_hook(lambda g: hear(name, g.detach().reshape(-1, g.shape[-1])))  # type: ignore[no-untyped-call]

        return attach

    with hooks(layer.get_submodule(v.output).register_forward_pre_hook(listener(v.name)) for v in values):
        yield
