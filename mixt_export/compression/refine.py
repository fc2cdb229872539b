"""Block refinement: train the factors of one block so that it gives what the original block gives.

The replaced block is fed what the compressed model feeds it (X'), the target is the original block's output on what the
original model feeds it (X): each block also makes up for the errors of those before it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from mixt_export.compression.blocks import BlockwiseModel
from mixt_export.compression.optimiser import Optimiser
from mixt_export.compression.precision import fast_products
from mixt_export.compression.report import BlockReport
from mixt_export.compression.scratch import IN_MEMORY
from mixt_export.errors import UsageError

Refine = Callable[[int, nn.Module, nn.Module, torch.Tensor, torch.Tensor], None]
"""Block index, original block, replaced block, X and X' at its input: trains the replaced block in place."""


#: Windows by which it is judged whether training helped.
_JUDGED = 8


@dataclass(frozen=True)
class RefineSettings:
    """``steps`` of ``batch`` windows each. ``matrix_rate``: relative step length of factors that are matrices;
    ``learning_rate``: of Adam, for everything else (see optimiser.py). Both after a linear ``warm_up`` (share of the
    steps), then along a cosine down to ``final`` of them.
    """

    steps: int = 60
    batch: int = 4
    matrix_rate: float = 5e-3
    learning_rate: float = 2e-3
    warm_up: float = 0.1
    final: float = 0.02

    def __post_init__(self) -> None:
        """Raise UsageError naming the first setting that makes no sense."""
        for name, least in (("steps", 1), ("batch", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"refine {name} is {getattr(self, name)}; it must be at least {least}.")
        for name in ("matrix_rate", "learning_rate"):
            if not 0.0 < getattr(self, name) < float("inf"):
                raise UsageError(f"refine {name.replace('_', ' ')} is {getattr(self, name)}; it must be positive.")
        for name in ("warm_up", "final"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise UsageError(f"refine {name.replace('_', ' ')} is {getattr(self, name)}; it is a share of 1.")


@dataclass(frozen=True)
class RefineReport:
    """``before``, ``after``: mean relative loss over the same few windows; equal where the training was undone.

    ``seconds``: of CPU time of this process; ``tokens``: trained on, repetitions counted.
    """

    block: int
    before: float
    after: float
    steps: int
    tokens: int
    seconds: float


def refiner(
    model: BlockwiseModel, settings: RefineSettings | None, seed: int, reports: list[BlockReport]
) -> Refine | None:
    """``refine_block`` with ``settings``, its batches drawn by ``seed`` and the block; appends what it did to
    ``reports``. None without settings.
    """
    if settings is None:
        return None

    def refine(index: int, dense: nn.Module, replaced: nn.Module, x: torch.Tensor, shifted: torch.Tensor) -> None:
        found = refine_block(model, index, dense, replaced, x, shifted, settings, seed + index)
        reports.append(BlockReport(index, found.steps, found.before, found.after))

    return refine


def refine_block(
    model: BlockwiseModel,
    index: int,
    dense: nn.Module,
    replaced: nn.Module,
    original: torch.Tensor,
    compressed: torch.Tensor,
    settings: RefineSettings,
    seed: int,
) -> RefineReport:
    """Train ``replaced`` (block ``index``) in place so that replaced(compressed) ≈ dense(original).

    ``original``, ``compressed``: the block's inputs in the original and in the compressed model, (windows, length,
    features) float32, not written to. Trained are the factors of every linear of ``replaced`` that has some and all
    its vectors (norms, biases); the caller sees to it that ``dense`` does not share those. The loss is relative token
    by token, mean_t ||o_t - y_t||² / (||y_t - x_t||² + ||x'_t - x_t||²) with x in ``original``, x' in ``compressed``
    and y = dense(x): by what the block adds and what it inherits. First tokens of a window have norms tens of times the
    others': absolute errors would be theirs alone, and so would errors by what the block adds, which to them is next
    to nothing, once an earlier block has their norm wrong. Training that raised the loss, judged on a few windows
    spread over all, is undone. Equal arguments give equal parameters on one machine. Raises UsageError when
    ``replaced`` has nothing to train.
    """
    began = time.process_time()
    trained = trainable(replaced)
    if not trained:
        raise UsageError(f"{model.block_path(index)}: no linear of this block is factorised, so it cannot be refined.")
    targets = _Targets(model, index, dense, original, settings)
    named = {str(position): parameter for position, parameter in enumerate(trained)}
    optimiser = Optimiser(named, settings.matrix_rate, settings.learning_rate)

    def loss_on(part: torch.Tensor) -> torch.Tensor:
        wanted = targets.of(part)
        scale = (wanted - original[part]).square().sum(-1) + (compressed[part] - original[part]).square().sum(-1)
        found = model.run(replaced, index, compressed[part])
        floor = 1e-6 * (scale.mean() or wanted.square().sum(-1).mean())  # a block that adds nothing has no scale
        return ((found - wanted).square().sum(-1) / scale.clamp_min(floor)).mean()

    @torch.no_grad()
    def judged() -> float:
        windows = torch.linspace(0, len(original) - 1, min(_JUDGED, len(original))).long()
        return sum(float(loss_on(window[None])) for window in windows) / len(windows)

    begun, before = [parameter.detach().clone() for parameter in trained], judged()
    with fast_products(), torch.enable_grad(), gradients_for(replaced, trained):
        for step, part in enumerate(draws(len(original), settings.batch, settings.steps, seed)):
            torch.autograd.backward(loss_on(part))
            optimiser.step(schedule(step, settings.steps, settings.warm_up, settings.final))
    after = judged()
    if not after < before:
        after = before
        with torch.no_grad():
            for parameter, value in zip(trained, begun, strict=True):
                parameter.copy_(value)
    return RefineReport(
        index,
        before,
        after,
        settings.steps,
        settings.steps * min(settings.batch, len(original)) * original.shape[1],
        round(time.process_time() - began, 3),
    )


def trainable(block: nn.Module) -> list[nn.Parameter]:
    """The factors of every linear of ``block`` that has some, and its vectors, each once."""
    found: dict[int, nn.Parameter] = {}
    factorised = False
    for module in block.modules():
        if isinstance(getattr(module, "cores", None), nn.ParameterList):
            factorised = True
            found.update((id(parameter), parameter) for parameter in module.parameters())
    found.update((id(parameter), parameter) for parameter in block.parameters() if parameter.ndim == 1)
    return list(found.values()) if factorised else []


def schedule(step: int, steps: int, warm_up: float, final: float) -> float:
    """Share of the learning rate at ``step`` (from 0) of ``steps``: linear warm-up, then a cosine down to ``final``."""
    warm = max(1.0, warm_up * steps)
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return min(1.0, (step + 1) / warm) * (final + (1 - final) * cosine)


def draws(windows: int, batch: int, steps: int, seed: int) -> Iterator[torch.Tensor]:
    """``steps`` batches of up to ``batch`` indices below ``windows``: each index once per pass, in a new order.

    A batch may hold indices of two passes. The same ``seed`` gives the same batches.
    """
    generator = torch.Generator().manual_seed(seed)
    batch = min(batch, windows)
    waiting = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(waiting) < batch:
            waiting = torch.cat([waiting, torch.randperm(windows, generator=generator)])
        yield waiting[:batch]
        waiting = waiting[batch:]


class _Targets:
    """Outputs of the original block, computed when first asked for and kept while they fit in memory."""

    def __init__(
        self, model: BlockwiseModel, index: int, dense: nn.Module, original: torch.Tensor, settings: RefineSettings
    ) -> None:
        self.model, self.index, self.dense, self.original = model, index, dense, original
        self.kept: dict[int, torch.Tensor] = {}
        self.room = IN_MEMORY // max(1, 4 * original[0].numel())

    @torch.no_grad()
    def of(self, part: torch.Tensor) -> torch.Tensor:
        """(batch, length, features) of the windows ``part``."""
        found = []
        for window in part.tolist():
            output = self.kept.get(window)
            if output is None:
                output = self.model.run(self.dense, self.index, self.original[window : window + 1])[0]
                if len(self.kept) < self.room:
                    self.kept[window] = output
            found.append(output)
        return torch.stack(found)


@contextmanager
def gradients_for(block: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside, gradients are taken for ``parameters`` alone; afterwards for nothing in ``block``."""
    block.requires_grad_(False)
    chosen = list(parameters)
    for parameter in chosen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in chosen:
            parameter.requires_grad_(False)
            parameter.grad = None
