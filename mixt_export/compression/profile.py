"""What the dense model says about its linears: Grams of inputs, Fisher matrices of outputs, spectra, factors.

One forward pass, block by block; where the output metric is the Fisher matrix, one backward pass from the last block
to the first, each block run again from its stored input. In memory: one block, the activations at one boundary, and
the statistics of one block. On disk: block inputs of the Fisher windows, Grams, factors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from mixt_export.compression.blocks import BlockwiseModel
from mixt_export.compression.closed_form import damped, decompose, quadratic_error
from mixt_export.compression.ranks import Candidate
from mixt_export.compression.scratch import Scratch
from mixt_export.compression.settings import Settings
from mixt_export.compression.statistics import (
    Gram,
    InputGroup,
    Reached,
    input_groups,
    listening,
    listening_to_gradients,
)
from mixt_export.progress import Progress


@dataclass(frozen=True)
class LinearProfile:
    """One linear under the dense model's statistics.

    ``candidate.loss`` and ``error`` (r,): what direction i carries of the objective and of the output error;
    ``energy``: mean ||W x||², what relative output errors are relative to.
    """

    candidate: Candidate
    error: np.ndarray
    energy: float


class Profiler:
    """Runs the passes. ``targets``: block index -> names of the targeted linears inside the block.

    ``windows`` (windows, length) int64, without rows where no statistics are needed; ``max_ranks``: linear name -> how
    many directions of its factors to store.
    """

    def __init__(
        self,
        model: BlockwiseModel,
        targets: Mapping[int, Sequence[str]],
        windows: np.ndarray[Any, Any],
        max_ranks: Mapping[str, int],
        settings: Settings,
        scratch: Scratch,
        progress: Progress,
        *,
        input_aware: bool,
        fisher: bool,
    ) -> None:
        self.model, self.targets, self.windows = model, targets, windows
        self.settings, self.scratch, self.progress = settings, scratch, progress
        self.max_ranks, self.input_aware, self.fisher = max_ranks, input_aware, fisher
        self.fisher_windows = min(settings.fisher_windows, len(windows)) if fisher else 0
        self.profiles: dict[str, LinearProfile] = {}
        self.loss = float("nan")
        self._groups: dict[int, tuple[InputGroup, ...]] = {}

    def run(self) -> dict[str, LinearProfile]:
        """Profiles by linear name; factors of every rank below dense are in the scratch as ``up:``/``down:`` + name."""
        if not len(self.windows):
            self._weights_only()
        else:
            last = self._forward()
            if self.fisher:
                self._backward(last)
        order = [f"{self.model.block_path(index)}.{name}" for index in self.targets for name in self.targets[index]]
        return {name: self.profiles[name] for name in order}

    def _weights_only(self) -> None:
        """Decompose under the identity on both sides."""
        with self.progress.task("decomposing weights", len(self.targets)) as advance:
            for index, names in self.targets.items():
                with self.model.block(index) as layer:
                    for name in names:
                        self._decompose(layer, index, name, None, None)
                advance(1)

    def _forward(self) -> torch.Tensor:
        """Advance all windows; returns the last block's output for the Fisher windows."""
        shape = (*self.windows.shape, self.model.hidden)
        hidden = self.model.embed(self.windows, self.scratch.working_array("stream", shape))
        with self.progress.task("input statistics", self.model.blocks) as advance:
            for index in range(self.model.blocks):
                self._save_boundary(index, hidden)
                with self.model.block(index) as layer:
                    grams = self._advance(layer, index, hidden)
                    if index in self.targets:
                        self._keep(layer, index, grams)
                advance(1)
        return hidden[: self.fisher_windows].clone()

    def _save_boundary(self, index: int, hidden: torch.Tensor) -> None:
        for window in range(self.fisher_windows):
            self.scratch.put(f"in:{index}:{window}", hidden[window].numpy())

    @torch.no_grad()
    def _advance(self, layer: nn.Module, index: int, hidden: torch.Tensor) -> list[Gram]:
        """Overwrite ``hidden`` by the block's output, gathering the Gram of each input group."""
        groups = self.groups(layer, index)
        grams = [Gram(group.features) for group in groups]
        with listening(layer, groups, lambda group, x: grams[group].add(x)):
            for part in batches(len(hidden), self.settings.batch):
                hidden[part] = self.model.run(layer, index, hidden[part])
        return grams

    def groups(self, layer: nn.Module, index: int) -> tuple[InputGroup, ...]:
        """Input groups of block ``index``; empty where nothing is targeted."""
        if index not in self._groups:
            self._groups[index] = find_groups(self.model, layer, index, self.targets.get(index, ()))
        return self._groups[index]

    def _keep(self, layer: nn.Module, index: int, grams: Sequence[Gram]) -> None:
        """Without Fisher the block is decomposed at once, else its Grams wait on disk for the backward pass."""
        for number, (group, gram) in enumerate(zip(self.groups(layer, index), grams, strict=True)):
            if self.fisher:
                self.scratch.put(f"gram:{index}:{number}", gram.mean().float().numpy())
                continue
            for name in group.linears:
                self._decompose(layer, index, name, gram.mean(), None)

    def _backward(self, last: torch.Tensor) -> None:
        """From the last block to the first: gradients at the linears' outputs, then the two-sided decomposition."""
        tokens = self.windows[: self.fisher_windows]
        gradients, self.loss = self.model.loss_gradients(lambda window: last[window], tokens)
        with self.progress.task("output statistics", self.model.blocks) as advance:
            for index in reversed(range(self.model.blocks)):
                with self.model.block(index) as layer:
                    fisher = self._backward_block(layer, index, gradients)
                    for number, group in enumerate(self.groups(layer, index)):
                        gram = torch.from_numpy(self.scratch.get(f"gram:{index}:{number}"))
                        for name in group.linears:
                            self._decompose(layer, index, name, gram, fisher[name].mean())
                advance(1)

    def _backward_block(self, layer: nn.Module, index: int, gradients: torch.Tensor) -> dict[str, Gram]:
        """Overwrite ``gradients`` (at the block's output) by those at its input, gathering Fisher matrices."""
        fisher = {name: Gram(layer.get_submodule(name).out_features) for name in self.targets.get(index, ())}  # type: ignore[arg-type]
        with listening_to_gradients(layer, tuple(fisher), lambda name, g: fisher[name].add(g)):
            for part in batches(len(gradients), self.settings.batch):
                stored = [self.scratch.get(f"in:{index}:{window}") for window in range(part.start, part.stop)]
                hidden = torch.from_numpy(np.stack(stored)).requires_grad_(True)
                output = self.model.run(layer, index, hidden)
                (gradients[part],) = torch.autograd.grad(output, hidden, gradients[part])
        for window in range(self.fisher_windows):
            self.scratch.drop(f"in:{index}:{window}")
        return fisher

    def _decompose(
        self, layer: nn.Module, index: int, name: str, gram: torch.Tensor | None, fisher: torch.Tensor | None
    ) -> None:
        weight = layer.get_submodule(name).weight
        assert isinstance(weight, torch.Tensor)
        out_features, in_features = weight.shape
        full = f"{self.model.block_path(index)}.{name}"
        metric = None if fisher is None else damped(fisher, self.settings.output_damping)
        used = damped(gram, self.settings.input_damping) if gram is not None and self.input_aware else None
        result = decompose(weight, used, metric, self.max_ranks[full])
        self.scratch.put(f"up:{full}", result.up.float().numpy())
        self.scratch.put(f"down:{full}", result.down.float().numpy())
        if fisher is not None:
            self.scratch.put(f"fisher:{full}", fisher.float().numpy())
        energy = quadratic_error(weight, torch.eye(in_features, dtype=torch.float64) if used is None else used)
        scale = 1.0 if fisher is None else 0.5  # second order of the loss: half the Fisher quadratic form
        candidate = Candidate(full, out_features, in_features, scale * result.loss.numpy())
        self.profiles[full] = LinearProfile(candidate, result.error.numpy(), energy)


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
