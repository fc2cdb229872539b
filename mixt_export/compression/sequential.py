"""Compress block after block while two streams advance: X through the dense model, X' through the compressed one.

Inside a block linears are replaced in the order of execution, input group by input group, so each group's X' already
went through everything before it (AA-SVD, arXiv 2604.02119, algorithm 1). A pass over the tokens for one group stops
as soon as the group's input has been seen; where factors need no X' there is no such pass. After the last group the
block may be refined as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from mixt_export.compression.blocks import BlockwiseModel
from mixt_export.compression.factor_solvers import Factors, FactorSolver, Seen
from mixt_export.compression.refine import Refine
from mixt_export.compression.roots import require_finite
from mixt_export.compression.scratch import Scratch
from mixt_export.compression.settings import Settings
from mixt_export.compression.statistics import Gram, InputGroup
from mixt_export.compression.streams import batches, find_groups, group_input
from mixt_export.compression.tensor_mixture.lockstep import Finish, own_copy
from mixt_export.compression.tensor_mixture.replacements import Replacement, replacement
from mixt_export.network import build
from mixt_export.progress import Progress


class SequentialCompressor:
    """Replaces every linear with a rank, in ``run``; ``finish`` gets each block that was replaced.

    ``targets``: block index -> linears inside the block; ``windows`` (windows, length) int64; ``ranks``: path -> rank,
    None: stays dense. ``refine`` trains each block that has factors. ``method``, ``dtype``: names of the method and by
    path of the stored dtype, for the IR. Results by path: ``tails``, what ``solver`` says was thrown away, and
    ``errors``, see LayerReport, both before refinement; a dense linear has no tail, and the drift of its input alone as
    error where X' was read.
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
        solver: FactorSolver,
        method: str,
        dtype: Callable[[str], str],
        refine: Refine | None,
        finish: Finish,
    ) -> None:
        self.model, self.targets, self.windows, self.ranks = model, targets, windows, ranks
        self.settings, self.scratch, self.progress = settings, scratch, progress
        self.solver, self.method, self.dtype = solver, method, dtype
        self.refine, self.finish = refine, finish
        self.tails: dict[str, float] = {}
        self.errors: dict[str, float] = {}

    @torch.no_grad()
    def run(self) -> None:
        """Process the blocks up to the last targeted one."""
        shape = (*self.windows.shape, self.model.hidden)
        original = self.model.embed(self.windows, self.scratch.working_array("stream", shape))
        first, last = min(self.targets), max(self.targets)
        compressed = original  # the same until the first block that is replaced
        with self.progress.task("compressing blocks", last + 1) as advance:
            for index in range(last + 1):
                if index == first:
                    room = self.scratch.working_array("compressed stream", shape)
                    compressed = torch.from_numpy(room).copy_(original)
                with self.model.block(index) as dense:
                    layer = self._replaced(dense, index, original, compressed) if index in self.targets else dense
                    if index < last:
                        self._advance(dense, index, original)
                        if index >= first:
                            self._advance(layer, index, compressed)
                advance(1)

    def _advance(self, layer: nn.Module, index: int, stream: torch.Tensor) -> None:
        for part in batches(len(stream), self.settings.batch):
            stream[part] = self.model.run(layer, index, stream[part])

    def _replaced(self, dense: nn.Module, index: int, original: torch.Tensor, compressed: torch.Tensor) -> nn.Module:
        """Block ``index`` with factors, refined and finished."""
        layer, made = own_copy(self.model, dense), dict[str, Replacement]()
        if self.solver.reads_inputs:
            for group in find_groups(self.model, dense, index, self.targets[index]):
                seen = self._seen(dense, layer, index, group, original, compressed)
                require_finite(seen.after, f"{self.model.block_path(index)}.{group.linears[0]}")
                for name in group.linears:
                    self._replace(dense, layer, index, name, seen, made)
        else:
            for name in self.targets[index]:
                self._replace(dense, layer, index, name, None, made)
        if self.refine is not None and made:
            with torch.enable_grad():
                self.refine(index, dense, layer, original, compressed)
        self.finish(index, dense, layer, made)
        return layer

    def _seen(
        self,
        dense: nn.Module,
        layer: nn.Module,
        index: int,
        group: InputGroup,
        original: torch.Tensor,
        compressed: torch.Tensor,
    ) -> Seen:
        after, drift, spread = (Gram(group.features) for _ in range(3))
        for part in batches(len(original), self.settings.batch):
            shifted = group_input(self.model, layer, index, group, compressed[part])
            difference = group_input(self.model, dense, index, group, original[part]) - shifted
            after.add(shifted)
            drift.add(difference, shifted)
            spread.add(difference)
        return Seen(after.mean(), drift.mean(), spread.mean())

    def _replace(
        self,
        dense: nn.Module,
        layer: nn.Module,
        index: int,
        name: str,
        seen: Seen | None,
        made: dict[str, Replacement],
    ) -> None:
        """Put factors in the place of linear ``name`` of ``layer``."""
        path = f"{self.model.block_path(index)}.{name}"
        linear = dense.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        weight, rank = linear.weight.detach(), self.ranks[path]
        if rank is None:
            self.tails[path] = 0.0
            self.errors[path] = 0.0 if seen is None else seen.error(weight, weight)
            return
        found: Factors = self.solver.solve(path, weight, rank, seen)
        self.tails[path], self.errors[path] = found.tail, found.error
        out_features, in_features = weight.shape
        ir = build.low_rank(path, in_features, out_features, rank, dtype=self.dtype(path), method=self.method)
        made[name] = replacement(ir, linear, [found.down.T, found.up.T], found.error)
        layer.set_submodule(name, made[name].module())
