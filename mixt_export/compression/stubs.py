"""Run a model's own forward without its blocks: what it hands to them, and what comes before the first."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

Listen = Callable[[int, torch.Tensor, dict[str, Any]], None]
"""Index of a block, the hidden state it is given (batch, length, features), its other arguments by name."""


@contextmanager
def stubbed(layers: Sequence[nn.Module], norm: nn.Module, listen: Listen) -> Iterator[None]:
    """While open, ``layers`` and ``norm`` return what they are given, without gradients; ``listen`` hears layers."""

    def stub(index: int) -> Callable[..., torch.Tensor]:
        names = list(inspect.signature(type(layers[index]).forward).parameters)[2:]

        def forward(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            listen(index, hidden, {**dict(zip(names, args, strict=False)), **kwargs})
            whole: torch.Tensor = hidden.as_subclass(_Whole)
            return whole

        return forward

    forwards: dict[Any, Callable[..., torch.Tensor]] = {module: stub(index) for index, module in enumerate(layers)}
    with torch.no_grad(), _replaced({**forwards, norm: lambda hidden: hidden}):
        yield


@contextmanager
def stubbed_embeddings(embeddings: Sequence[nn.Embedding]) -> Iterator[None]:
    """While open, ``embeddings`` give zeros, of whatever device their weights are."""

    def stub(size: int) -> Callable[..., torch.Tensor]:
        return lambda ids: torch.zeros(*ids.shape, size)

    with _replaced({module: stub(module.embedding_dim) for module in embeddings}):
        yield


@contextmanager
def _replaced(forwards: dict[Any, Callable[..., torch.Tensor]]) -> Iterator[None]:
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in forwards:
            del module.forward


class _Whole(torch.Tensor):
    """What a stubbed block returns: itself where a model takes the first part of a block's result."""

    def __getitem__(self, index: Any) -> Any:
        """Itself for 0, else as any tensor."""
        return self if isinstance(index, int) and index == 0 else super().__getitem__(index)


def release(*modules: nn.Module) -> None:
    """Free the parameters of ``modules``; buffers stay, they are computed and small."""
    for module in modules:
        for part in module.modules():
            for name, parameter in list(part.named_parameters(recurse=False)):
                if not parameter.is_meta:
                    empty = torch.empty_like(parameter, device="meta")
                    part.register_parameter(name, nn.Parameter(empty, requires_grad=False))
