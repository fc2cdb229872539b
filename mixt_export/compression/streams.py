"""Helpers of passes through blocks: what reads what, in which batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress

import torch
from torch import nn

from mixt_export.compression.blocks import BlockwiseModel
from mixt_export.compression.statistics import InputGroup, Reached, input_groups, listening


def find_groups(model: BlockwiseModel, layer: nn.Module, index: int, linears: Sequence[str]) -> tuple[InputGroup, ...]:
    """Input groups of the ``linears`` of block ``index``, found by running it on two tokens."""
    if not linears:
        return ()
    with torch.no_grad():
        return input_groups(layer, linears, lambda: model.run(layer, index, torch.zeros(1, 2, model.hidden)))


def group_input(
    model: BlockwiseModel, layer: nn.Module, index: int, group: InputGroup, hidden: torch.Tensor
) -> torch.Tensor:
    """What ``group`` reads when ``layer`` (block ``index`` or its clone) gets ``hidden``: (tokens, features).

    The pass ends there: what comes behind the group is not computed.
    """
    caught: list[torch.Tensor] = []

    def hear(_group: int, x: torch.Tensor) -> None:
        caught.append(x)
        raise Reached

    with listening(layer, (group,), hear), suppress(Reached):
        model.run(layer, index, hidden)
    return caught[0]


def batches(count: int, size: int) -> Iterator[slice]:
    """Slices of at most ``size`` that cover range(count)."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
