"""Tucker decompositions of attention and MLP, block after block, from the weights alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from mixt_export.checkpoints import NewTensor
from mixt_export.checkpoints.dtypes import numpy_dtype
from mixt_export.compression.clock import Clock
from mixt_export.compression.families import TuckerOptions
from mixt_export.compression.job import Job, Result
from mixt_export.compression.report import LayerReport
from mixt_export.compression.request import Request
from mixt_export.compression.scratch import Scratch
from mixt_export.compression.tucker.decomposition import hosvd
from mixt_export.compression.tucker.sizing import OPTION, checked, choose, fitting, kind_of, parse_ranks
from mixt_export.compression.tucker.stacks import Ranks, Solution, Stack
from mixt_export.compression.tucker.targets import stacks_of
from mixt_export.errors import UsageError
from mixt_export.network import FactorizedLinear
from mixt_export.progress import Progress


class TuckerJob(Job):
    """See the module and Job."""

    stacks: dict[int, list[Stack]]

    def __init__(self, request: Request) -> None:
        assert isinstance(request.own, TuckerOptions)
        self.own = request.own
        if not 0.0 < self.own.keep <= 1.0:
            raise UsageError(
                f"--keep {self.own.keep:g} is not a share; give a number above 0 and up to 1, such as 0.5."
            )
        if self.own.hooi_sweeps < 0 or not self.own.hooi_tolerance >= 0.0:
            raise UsageError("--hooi-sweeps and --hooi-tolerance are at least 0.")
        self.asked = parse_ranks(self.own.tucker_ranks)
        super().__init__(request)

    @property
    def needs_tokens(self) -> bool:
        """See Job."""
        return False

    @property
    def recipe(self) -> dict[str, Any]:
        """See Job."""
        return {
            "keep": self.own.keep,
            "tucker_ranks": {kind: list(ranks) for kind, ranks in self.asked.items()},
            "tucker_share": self.own.tucker_share,
            "hooi_sweeps": self.own.hooi_sweeps,
            "hooi_tolerance": self.own.hooi_tolerance,
        }

    @property
    def budget(self) -> int:
        """See Job."""
        total = 0
        for stack in self._all_stacks():
            asked = self._asked(stack)
            total += int(self.own.keep * stack.dense) if asked is None else stack.parameters(asked)
        return total

    @property
    def scratch_bytes(self) -> int:
        """The cores, float32."""
        return 4 * self.budget

    def check(self) -> None:
        """Raise UsageError for ranks that do not fit a stack, a kind that is not there, a share too small for any."""
        config = self.model.model.config
        shapes = {name: self.shape(name) for name in self.targets}
        self.stacks = {}
        for index, names in self.by_block().items():
            paths = [f"{self.model.block_path(index)}.{name}" for name in names]
            self.stacks[index] = stacks_of(paths, shapes, config, share=self.own.tucker_share)
        present = {kind_of(stack) for stack in self._all_stacks()}
        missing = [kind for kind in self.asked if kind not in present]
        if missing:
            raise UsageError(
                f"{OPTION}: nothing that is compressed is of kind {missing[0]}, only {', '.join(sorted(present))}."
            )
        sized: set[tuple[str, tuple[int, ...], int]] = set()
        for stack in self._all_stacks():
            key = (kind_of(stack), stack.sizes, stack.copies)
            if key in sized:
                continue
            sized.add(key)
            if self._asked(stack) is None and self.own.keep < 1.0:
                fitting(stack, self.own.keep * stack.dense)

    def run(self, scratch: Scratch, clock: Clock, progress: Progress) -> Result:
        """See Job."""
        made = _Made(self, scratch)
        with clock.stage("decomposition"), progress.task("decomposing", sum(1 for _ in self._all_stacks())) as advance:
            for index, stacks in self.stacks.items():
                with self.model.block(index) as block:
                    for stack in stacks:
                        made.add(stack, *self._decompose(stack, block, f"{self.model.block_path(index)}."))
                        advance(1)
        layers = tuple(made.layers[name] for name in self.targets)
        return Result(layers, (), made.factors, made.tensors)

    def _all_stacks(self) -> Iterable[Stack]:
        return (stack for stacks in self.stacks.values() for stack in stacks)

    def _asked(self, stack: Stack) -> Ranks | None:
        ranks = self.asked.get(kind_of(stack))
        return None if ranks is None else checked(stack, ranks)

    def _decompose(
        self, stack: Stack, block: nn.Module, prefix: str
    ) -> tuple[Ranks, Solution | None, dict[str, float]]:
        """Ranks, cores (None: it stays dense) and the relative squared error of every member."""
        weights = {}
        for name in stack.members.values():
            linear = block.get_submodule(name.removeprefix(prefix))
            assert isinstance(linear, nn.Linear)
            weights[name] = linear.weight.detach()
        tensor = stack.tensor(weights).double()
        ranks, bases = self._asked(stack), None
        if ranks is None and self.own.keep < 1.0:
            bases = hosvd(tensor, len(stack.sizes))
            ranks = choose(stack, bases.captured(), self.own.keep)
        if ranks is None or ranks == stack.sizes:
            return stack.sizes, None, dict.fromkeys(weights, 0.0)
        found = stack.solve(tensor, ranks, bases, self.own.hooi_tolerance, self.own.hooi_sweeps)
        energies = {name: float(weight.double().square().sum()) for name, weight in weights.items()}
        errors = {
            name: float((weights[name] - rebuilt).square().sum()) / energies[name] if energies[name] else 0.0
            for name, rebuilt in stack.matrices(found.rebuilt).items()
        }
        return ranks, found, errors


class _Made:
    """What the run leaves: IR, cores (in the scratch until they are written) and the report of every linear."""

    def __init__(self, job: TuckerJob, scratch: Scratch) -> None:
        self.job, self.scratch = job, scratch
        self.factors: dict[str, FactorizedLinear] = {}
        self.tensors: list[NewTensor] = []
        self.layers: dict[str, LayerReport] = {}

    def add(self, stack: Stack, ranks: Ranks, solution: Solution | None, errors: dict[str, float]) -> None:
        """Keep what became of ``stack``."""
        names = list(stack.members.values())
        if solution is None:
            for name in names:
                self._report(name, "dense", self._dense(name), 0.0, None)
            return
        dtype = self.job.dtype(names[0])
        store = self.job.checkpoint.store
        linears = stack.linears(ranks, dtype)
        for name, linear in linears.items():
            bias = store[f"{name}.bias"].ref if f"{name}.bias" in store else None
            self.factors[name] = replace(linear, bias=bias)
        for name, values in solution.tensors.items():
            self._keep(name, dtype, values)
        shares = _shares(stack.parameters(ranks), [self._dense(name) for name in names])
        for name, params in zip(names, shares, strict=True):
            self._report(name, "tucker", params, errors[name], ranks)

    def _dense(self, name: str) -> int:
        out_features, in_features = self.job.shape(name)
        return out_features * in_features

    def _report(self, name: str, method: str, params: int, error: float, ranks: Ranks | None) -> None:
        out_features, in_features = self.job.shape(name)
        self.layers[name] = LayerReport(
            name,
            out_features,
            in_features,
            method,
            params,
            params / (out_features * in_features),
            error,
            ranks=ranks,
        )

    def _keep(self, name: str, dtype: str, values: torch.Tensor) -> None:
        array = values.contiguous().numpy()
        self.scratch.put(name, array.astype(np.float32))

        def produce() -> np.ndarray[Any, Any]:
            return self.scratch.get(name).astype(numpy_dtype(dtype))

        self.tensors.append(NewTensor(name, dtype, tuple(array.shape), produce))


def _shares(total: int, weights: list[int]) -> list[int]:
    """``total`` in whole parts in proportion to ``weights``: what is shared belongs to all that share it."""
    ends = [total * sum(weights[: number + 1]) // sum(weights) for number in range(len(weights))]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]
