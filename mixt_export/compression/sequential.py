"""Compress block after block while two streams advance: X through the dense model, X' through the compressed one.

Inside a block linears are replaced in the order of execution, input group by input group, so each group's X' already
went through everything before it (AA-SVD, arXiv 2604.02119, algorithm 1). A pass over the tokens for one group stops
as soon as the group's input has been seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from mixt_export.compression.blocks import BlockwiseModel
from mixt_export.compression.closed_form import anchored_target, damped, decompose, quadratic_error
from mixt_export.compression.profile import batches, find_groups, group_input
from mixt_export.compression.scratch import Scratch
from mixt_export.compression.settings import Settings
from mixt_export.compression.statistics import Gram, InputGroup
from mixt_export.progress import Progress


class SequentialCompressor:
    """Writes the factors of every linear with a rank into the scratch (``up:``, ``down:`` + name).

    ``anchored``: the target is the dense output on X (objective 4); otherwise on X' (objective 3, shift-aware).
    ``fisher(name)`` gives the output metric or None for the identity. Results: ``tails`` and ``errors`` by name, the
    objective's tail at the chosen rank and ||W X - W' X'||² / ||W X||² (0 and the drift alone for dense linears).
    """

    def __init__(
        self,
        model: BlockwiseModel,
        targets: Mapping[int, Sequence[str]],
        windows: np.ndarray[Any, Any],
        ranks: Mapping[str, int | None],
        settings: Settings,
        scratch: Scratch,
        progress: Progress,
        *,
        anchored: bool,
        fisher: Callable[[str], torch.Tensor | None],
    ) -> None:
        self.model, self.targets, self.windows, self.ranks = model, targets, windows, ranks
        self.settings, self.scratch, self.progress = settings, scratch, progress
        self.anchored, self.fisher = anchored, fisher
        self.tails: dict[str, float] = {}
        self.errors: dict[str, float] = {}

    @torch.no_grad()
    def run(self) -> None:
        """Process all blocks, first to last."""
        shape = (*self.windows.shape, self.model.hidden)
        original = self.model.embed(self.windows, self.scratch.working_array("stream", shape))
        compressed = torch.from_numpy(self.scratch.working_array("compressed stream", shape)).copy_(original)
        with self.progress.task("compressing blocks", self.model.blocks) as advance:
            for index in range(self.model.blocks):
                with self.model.block(index) as dense:
                    replaced = self.model.clone(dense)
                    for group in find_groups(self.model, dense, index, self.targets.get(index, ())):
                        self._replace(dense, replaced, index, group, original, compressed)
                    for part in batches(len(original), self.settings.batch):
                        original[part] = self.model.run(dense, index, original[part])
                        compressed[part] = self.model.run(replaced, index, compressed[part])
                advance(1)

    def _replace(
        self,
        dense: nn.Module,
        replaced: nn.Module,
        index: int,
        group: InputGroup,
        original: torch.Tensor,
        compressed: torch.Tensor,
    ) -> None:
        """Choose the factors of one group and put their product in the place of the weights of ``replaced``."""
        before, cross, after = (Gram(group.features) for _ in range(3))
        for part in batches(len(original), self.settings.batch):
            x = group_input(self.model, dense, index, group, original[part])
            shifted = group_input(self.model, replaced, index, group, compressed[part])
            before.add(x)
            cross.add(x, shifted)
            after.add(shifted)
        for name in group.linears:
            full = f"{self.model.block_path(index)}.{name}"
            linear = replaced.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            weight, rank = linear.weight.detach(), self.ranks[full]
            product = weight
            if rank is None:
                self.tails[full] = 0.0
            else:
                product = self._factorise(full, weight, rank, cross.mean(), after.mean())
                linear.weight = nn.Parameter(product, requires_grad=False)
            self.errors[full] = _output_error(weight, product, before.mean(), cross.mean(), after.mean())

    def _factorise(
        self, name: str, weight: torch.Tensor, rank: int, cross: torch.Tensor, after: torch.Tensor
    ) -> torch.Tensor:
        target = anchored_target(weight, cross, after, self.settings.anchor_damping) if self.anchored else weight
        damping = self.settings.anchor_damping if self.anchored else self.settings.input_damping
        metric = self.fisher(name)
        used = None if metric is None else damped(metric, self.settings.output_damping)
        result = decompose(target, damped(after, damping), used, rank)
        self.scratch.put(f"up:{name}", result.up.float().numpy())
        self.scratch.put(f"down:{name}", result.down.float().numpy())
        self.tails[name] = float(result.loss[rank:].sum()) * (1.0 if metric is None else 0.5)
        return (result.up @ result.down).float()


def _output_error(
    weight: torch.Tensor, product: torch.Tensor, before: torch.Tensor, cross: torch.Tensor, after: torch.Tensor
) -> float:
    """mean ||W x - W' x'||² / mean ||W x||² from the second moments of x and x'."""
    energy = quadratic_error(weight, before)
    if energy <= 0.0:
        return 0.0
    w, p = weight.double(), product.double()
    mixed = float(((w @ cross) * p).sum())
    return max(0.0, (energy - 2 * mixed + quadratic_error(p, after)) / energy)
