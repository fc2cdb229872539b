"""Second moments of what flows into and back out of linears, gathered with hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mixt_export.errors import UnsupportedError

#: Columns of a symmetric product computed at once: large enough for full GEMM speed, small enough to save a third.
_BLOCK = 384


@dataclass(frozen=True)
class InputGroup:
    """Linears (names inside their block) that read the very same tensor, in the order of execution: q, k, v; o; …"""

    linears: tuple[str, ...]
    features: int


class Gram:
    """Running second moment of rows: float32 products of a batch, summed in float64.

    With one argument to ``add`` it is symmetric, (features, features), and only its upper block triangle is computed;
    with two it is xᵀ y.
    """

    def __init__(self, features: int) -> None:
        self._sum = torch.zeros(features, features, dtype=torch.float64)
        self._sizes = torch.zeros(features, dtype=torch.float64)
        self._symmetric = True
        self.count = 0

    def add(self, x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        """Add the rows of ``x`` (tokens, features) against those of ``y``, of the same shape (x itself when None)."""
        self.count += len(x)
        if y is not None:
            self._symmetric = False
            self._sum += (x.T @ y).double()
            return
        for start in range(0, x.shape[1], _BLOCK):
            self._sum[start : start + _BLOCK, start:] += (x[:, start : start + _BLOCK].T @ x[:, start:]).double()
        self._sizes += x.abs().sum(0).double()

    def mean(self) -> torch.Tensor:
        """Sum over tokens divided by their number, (features, features) float64."""
        total = self._sum
        if self._symmetric:
            upper = total.triu()
            total = upper + upper.triu(1).T
        return total / max(1, self.count)

    def magnitude(self) -> torch.Tensor:
        """Mean |x_j| of a symmetric one, (features,) float64."""
        return self._sizes / max(1, self.count)


def input_groups(block: nn.Module, linears: Sequence[str], run: Callable[[], object]) -> tuple[InputGroup, ...]:
    """Group ``linears`` of ``block`` by the tensor they read while ``run()`` executes it once; order of execution.

    Raises UnsupportedError when a linear is not executed.
    """
    seen: list[tuple[torch.Tensor, list[str]]] = []

    def listener(name: str) -> Callable[..., None]:
        def hear(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            for tensor, names in seen:
                if tensor is inputs[0]:
                    names.append(name)
                    return
            seen.append((inputs[0], [name]))

        return hear

    with hooks(block.get_submodule(name).register_forward_pre_hook(listener(name)) for name in linears):
        run()
    heard = {name for _, names in seen for name in names}
    missing = [name for name in linears if name not in heard]
    if missing:
        raise UnsupportedError(f"the linear {missing[0]!r} takes no part in the block's forward pass; --exclude it.")
    return tuple(InputGroup(tuple(names), tensor.shape[-1]) for tensor, names in seen)


@contextmanager
def listening(
    block: nn.Module, groups: Sequence[InputGroup], hear: Callable[[int, torch.Tensor], None]
) -> Iterator[None]:
    """While open, ``hear(group index, x)`` gets each group's input (tokens, features), once per forward pass."""

    def listener(index: int) -> Callable[..., None]:
        return lambda _module, inputs: hear(index, inputs[0].detach().reshape(-1, inputs[0].shape[-1]))

    with hooks(
        block.get_submodule(group.linears[0]).register_forward_pre_hook(listener(index))
        for index, group in enumerate(groups)
    ):
        yield


@contextmanager
def listening_to_gradients(
    block: nn.Module, linears: Sequence[str], hear: Callable[[str, torch.Tensor], None]
) -> Iterator[None]:
    """While open, ``hear(name, g)`` gets the gradient (tokens, out) at each linear's output during a backward pass."""

    def listener(name: str) -> Callable[..., None]:
        def attach(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
            output.register_hook(lambda g: hear(name, g.detach().reshape(-1, g.shape[-1])))  # type: ignore[no-untyped-call]

        return attach

    with hooks(block.get_submodule(name).register_forward_hook(listener(name)) for name in linears):
        yield


class Reached(Exception):  # noqa: N818 - not an error: it ends a forward pass that has served its purpose
    """Raised inside a forward pass when the input that was waited for has been seen."""


@contextmanager
def hooks(handles: Any) -> Iterator[None]:
    """While open, the hooks behind ``handles`` are in place."""
    held = list(handles)
    try:
        yield
    finally:
        for handle in held:
            handle.remove()
