"""Make MixT of a dense model: hidden channels reordered, then closed form and refinement block after block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from mixt_export.compression.clock import Clock
from mixt_export.compression.families import MixTOptions
from mixt_export.compression.job import Result
from mixt_export.compression.lockstep_job import LockstepJob
from mixt_export.compression.made import parameters_of
from mixt_export.compression.permutation import GATED_MLP, permute_block
from mixt_export.compression.request import Request
from mixt_export.compression.scratch import Scratch
from mixt_export.compression.tensor_mixture.lockstep import Prepare
from mixt_export.compression.tensor_mixture.replacements import Solve, mixt_solver
from mixt_export.compression.tensor_mixture.sizes import mixt_of, terms_of
from mixt_export.network import FactorizedLinear
from mixt_export.progress import Progress


class MixTJob(LockstepJob):
    """See the module and LockstepJob."""

    linears: dict[str, FactorizedLinear]

    def __init__(self, request: Request) -> None:
        assert isinstance(request.own, MixTOptions)
        self.own = request.own
        self._unmoved: list[int] = []
        super().__init__(request, request.own)

    @property
    def recipe(self) -> dict[str, Any]:
        """See Job."""
        return {
            "blocks": self.request.blocks,
            "n_tensors": dict(self.own.n_tensors) if isinstance(self.own.n_tensors, Mapping) else self.own.n_tensors,
            "bond": self.own.bond,
            "paper_padding": self.own.paper_padding,
            "permute": self.own.permute,
            "refine_steps": self.refinement.steps if self.refinement else 0,
            "controls": self.own.controls,
        }

    @property
    def budget(self) -> int:
        """See Job."""
        return sum(parameters_of(linear) for linear in self.linears.values())

    def check(self) -> None:
        """Raise UsageError where N_T does not fit a linear."""
        terms = terms_of(self.own.n_tensors, self.targets)
        shapes = {name: self.shape(name) for name in self.targets}
        dtypes = {name: self.dtype(name) for name in self.targets}
        self.linears = mixt_of(shapes, terms, dtypes, bond=self.own.bond, paper_padding=self.own.paper_padding)

    def solver(self) -> tuple[Solve, Mapping[str, int]]:
        """See LockstepJob."""
        params = {name: parameters_of(linear) for name, linear in self.linears.items()}
        return mixt_solver(self.linears, self.settings), params

    def describe(self, linear: FactorizedLinear) -> Mapping[str, Any]:
        """See LockstepJob."""
        return {"terms": len(linear.branches)}

    def run(self, scratch: Scratch, clock: Clock, progress: Progress) -> Result:
        """See Job."""
        self._unmoved.clear()
        result = super().run(scratch, clock, progress)
        if self._unmoved:
            progress.note(
                f"blocks {', '.join(map(str, self._unmoved))} keep the order of their hidden channels: --permute needs "
                "gate, up and down replaced alike, in the exact form, without biases, and not too large"
            )
        return result

    def preparation(self, progress: Progress) -> Prepare | None:
        """Reorders the hidden channels of an MLP whose three linears all become MixT; None when not asked for.

        Blocks of which something is replaced in the MLP and whose order stays are told of when the run ends.
        """
        if not self.own.permute:
            return None

        def permute(index: int, block: nn.Module, inputs: Iterable[torch.Tensor]) -> None:
            prefix = f"{self.model.block_path(index)}."
            inside = {
                name.removeprefix(prefix): linear for name, linear in self.linears.items() if name.startswith(prefix)
            }
            if not permute_block(block, inside, inputs) and any(name in inside for name in GATED_MLP):
                self._unmoved.append(index)

        return permute
