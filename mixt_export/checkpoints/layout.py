"""Names of tensors: which layer one belongs to, and the order in which they lie in a file."""

from __future__ import annotations

import re

_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)\.")
_DIGITS = re.compile(r"(\d+)")

#: The linears of a decoder layer in order of execution.
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

Place = tuple[int, int, int, tuple[tuple[int, int, str], ...]]


def layer_of(name: str) -> int | None:
    """Number of the layer that the tensor or linear ``name`` belongs to, or None."""
    match = _LAYER.search(name)
    return None if match is None else int(match.group(1))


def place(name: str) -> Place:
    """Sort key: embeddings, layers in order, the rest. In a layer: norms, then the linears in order of execution."""
    layer = layer_of(name)
    if layer is None:
        return (0 if "embed" in name else 2, 0, 0, _natural(name))
    parts = name.split(".")
    linear = next((number for number, part in enumerate(LINEARS, 1) if part in parts), 0)
    return (1, layer, linear, _natural(name))


def _natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key under which core10 follows core9."""
    return tuple((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in _DIGITS.split(name))
