"""Replace linears block after block in several variants at once, and carry held-out texts along to score them.

The calibration tokens run through the original (X) and through every variant (X', each its own). Inside a block
linears are replaced in the order of execution, input group by input group; the target is the original's output on X, so
each group makes up for the errors before it (AA-SVD, arXiv 2604.02119, algorithm 1). Blocks before the first replaced
one are run once for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from mixt_export.compression.blocks import BlockwiseModel
from mixt_export.compression.permutation import GATED_MLP
from mixt_export.compression.refine import Refine
from mixt_export.compression.statistics import InputGroup
from mixt_export.compression.streams import batches, find_groups, group_input
from mixt_export.compression.tensor_mixture.moments import Moments, token_weights
from mixt_export.compression.tensor_mixture.replacements import Replacement, Solve
from mixt_export.progress import Progress

Finish = Callable[[int, nn.Module, nn.Module, Mapping[str, Replacement]], None]
"""Block index, original block, replaced block, its replacements by name inside the block: what is done with them."""


@dataclass
class Variant:
    """One way to replace. ``solve`` None: the linears give zero; ``refine`` and ``finish`` see each replaced block."""

    solve: Solve | None = None
    refine: Refine | None = None
    finish: Finish | None = None
    calibration: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    held_out: list[torch.Tensor] = field(default_factory=list)


Prepare = Callable[[int, nn.Module, Iterator[torch.Tensor]], object]
"""Block index, original block, what its MLP reads (tokens, features) batch by batch: rewrites the block in place and
keeps its function."""


class Lockstep:
    """``targets``: block index -> linears by name inside the block. Streams are (windows, length, features) float32.

    ``allocate(label, like)`` gives memory for one more stream as large as ``like``. ``prepare`` gets every block to be
    replaced first.
    """

    def __init__(
        self,
        model: BlockwiseModel,
        targets: Mapping[int, Sequence[str]],
        variants: Mapping[str, Variant],
        batch: int,
        allocate: Callable[[str, torch.Tensor], torch.Tensor],
        progress: Progress,
        prepare: Prepare | None = None,
    ) -> None:
        self.prepare = prepare
        self.model, self.targets, self.variants = model, targets, variants
        self.batch, self.allocate, self.progress = batch, allocate, progress

    @torch.no_grad()
    def run(self, calibration: torch.Tensor, held_out: Sequence[torch.Tensor]) -> None:
        """Process all blocks; ``held_out`` (embeddings) ends as the outputs of the original's last block.

        ``calibration`` is overwritten; without ``held_out`` the pass ends with the last block that is replaced.
        """
        first, last = min(self.targets), max(self.targets)
        stop = self.model.blocks if held_out else last + 1
        with self.progress.task("replacing blocks", stop) as advance:
            for index in range(stop):
                if index == first:
                    self._split(calibration, held_out)
                with self.model.block(index) as original:
                    replaced = self._replace(original, index, calibration) if index in self.targets else {}
                    if index >= first:
                        for name, variant in self.variants.items():
                            layer = replaced.get(name, original)
                            for stream in (*([variant.calibration] if index < last else []), *variant.held_out):
                                self._advance(layer, index, stream)
                    for stream in (*([calibration] if index < last else []), *held_out):
                        self._advance(original, index, stream)
                advance(1)

    def _split(self, calibration: torch.Tensor, held_out: Sequence[torch.Tensor]) -> None:
        """Give every variant streams of its own."""
        for name, variant in self.variants.items():
            if variant.solve is not None:
                variant.calibration = self.allocate(name, calibration).copy_(calibration)
            variant.held_out = [stream.clone() for stream in held_out]

    def _advance(self, layer: nn.Module, index: int, stream: torch.Tensor) -> None:
        for part in batches(len(stream), self.batch):
            stream[part] = self.model.run(layer, index, stream[part])

    def _replace(self, original: nn.Module, index: int, calibration: torch.Tensor) -> dict[str, nn.Module]:
        """The replaced block of every variant."""
        if self.prepare is not None:
            self.prepare(index, original, self._mlp_inputs(original, index, calibration))
        blocks = {name: own_copy(self.model, original) for name in self.variants}
        made: dict[str, dict[str, Replacement]] = {name: {} for name in self.variants}
        for group in find_groups(self.model, original, index, self.targets[index]):
            moments = self._moments(original, blocks, index, group, calibration)
            for variant, block in blocks.items():
                solve = self.variants[variant].solve
                for linear in group.linears:
                    old = original.get_submodule(linear)
                    assert isinstance(old, nn.Linear)
                    if solve is None:
                        block.set_submodule(linear, _Zero(old.out_features))
                        continue
                    path = f"{self.model.block_path(index)}.{linear}"
                    found = solve(path, old, moments[variant].pop(linear))
                    made[variant][linear] = found
                    block.set_submodule(linear, found.module())
        for name, variant_ in self.variants.items():
            if variant_.refine is not None:
                with torch.enable_grad():
                    variant_.refine(index, original, blocks[name], calibration, variant_.calibration)
            if variant_.finish is not None:
                variant_.finish(index, original, blocks[name], made[name])
        return blocks

    def _mlp_inputs(self, original: nn.Module, index: int, calibration: torch.Tensor) -> Iterator[torch.Tensor]:
        group = InputGroup(GATED_MLP[:1], self.model.hidden)
        return (
            group_input(self.model, original, index, group, calibration[part])
            for part in batches(len(calibration), self.batch)
        )

    def _moments(
        self,
        original: nn.Module,
        blocks: Mapping[str, nn.Module],
        index: int,
        group: InputGroup,
        calibration: torch.Tensor,
    ) -> dict[str, dict[str, Moments]]:
        """Variant -> linear of the group -> moments over the calibration tokens."""
        linears: dict[str, nn.Linear] = {name: original.get_submodule(name) for name in group.linears}  # type: ignore[misc]
        fitted = [name for name, variant in self.variants.items() if variant.solve is not None]
        found = {
            variant: {name: Moments(linear.out_features, linear.in_features) for name, linear in linears.items()}
            for variant in fitted
        }
        for part in batches(len(calibration), self.batch):
            x = group_input(self.model, original, index, group, calibration[part])
            inputs = {
                variant: group_input(
                    self.model, blocks[variant], index, group, self.variants[variant].calibration[part]
                )
                for variant in fitted
            }
            for name, linear in linears.items():
                wanted = nn.functional.linear(x, linear.weight)
                weights = token_weights(wanted)
                for variant in fitted:
                    found[variant][name].add(wanted, inputs[variant], weights)
        return found


class _Zero(nn.Module):
    """A linear that is not there: zeros (..., out)."""

    def __init__(self, out_features: int) -> None:
        super().__init__()
        self.out_features = out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        return x.new_zeros(*x.shape[:-1], self.out_features)


def own_copy(model: BlockwiseModel, original: nn.Module) -> nn.Module:
    """A clone that shares the matrices of ``original`` but owns its vectors: norms and biases may be trained."""
    block = model.clone(original)
    for module in block.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.ndim < 2:
                module.register_parameter(name, nn.Parameter(parameter.detach().clone(), requires_grad=False))
    return block
