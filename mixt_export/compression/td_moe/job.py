"""Decompose the experts of every layer, block after block; statistics, where asked for, from the dense model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from mixt_export.checkpoints import NewTensor
from mixt_export.checkpoints.dtypes import numpy_dtype
from mixt_export.compression.clock import Clock
from mixt_export.compression.closed_form import damped
from mixt_export.compression.families import TdMoeOptions
from mixt_export.compression.job import Job, Result
from mixt_export.compression.report import LayerReport
from mixt_export.compression.request import Request
from mixt_export.compression.scratch import IN_MEMORY, Scratch
from mixt_export.compression.statistics import Gram
from mixt_export.compression.streams import batches
from mixt_export.compression.td_moe.decomposition import Factors, decompose, spectra
from mixt_export.compression.td_moe.sizing import CLOSE, Stack, choose
from mixt_export.errors import CheckpointError, UsageError
from mixt_export.network import FactorizedLinear, build
from mixt_export.progress import Progress

#: --whitening -> whether inputs and whether outputs are weighed by their statistics.
WHITENINGS = {"none": (False, False), "input": (True, False), "output": (False, True), "both": (True, True)}

_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)")


@dataclass(frozen=True)
class Target:
    """All experts' linears of one kind in one layer: ``stem``, e.g. ``model.layers.0.mlp.experts``, and ``kind``."""

    stem: str
    kind: str
    stack: Stack

    @property
    def linears(self) -> tuple[str, ...]:
        """Module paths of the experts' linears."""
        return tuple(f"{self.stem}.{expert}.{self.kind}" for expert in range(self.stack.experts))

    @property
    def shared(self) -> tuple[str, str]:
        """Names of the tensors U_in and U_out."""
        return f"{self.stem}.{self.kind}.u_in", f"{self.stem}.{self.kind}.u_out"


class TdMoeJob(Job):
    """See the module and Job."""

    stacks: dict[int, list[Target]]

    def __init__(self, request: Request) -> None:
        assert isinstance(request.own, TdMoeOptions)
        self.own = request.own
        if not 0.0 < self.own.keep <= 1.0:
            raise UsageError(
                f"--keep {self.own.keep:g} is not a share; give a number above 0 and up to 1, such as 0.8."
            )
        if self.own.whitening not in WHITENINGS:
            raise UsageError(f"--whitening {self.own.whitening!r} is unknown; choose one of {', '.join(WHITENINGS)}.")
        super().__init__(request)

    @property
    def needs_tokens(self) -> bool:
        """See Job."""
        return any(WHITENINGS[self.own.whitening])

    @property
    def recipe(self) -> dict[str, Any]:
        """See Job."""
        return {"keep": self.own.keep, "whitening": self.own.whitening, "expert_down": self.own.expert_down}

    @property
    def budget(self) -> int:
        """See Job."""
        return int(self.own.keep * self.dense)

    @property
    def scratch_bytes(self) -> int:
        """The factors and, where it is too large for memory, the stream; float32."""
        settings, hidden = self.settings, int(self.checkpoint.config.get("hidden_size", 0))
        stream = settings.windows * settings.window * hidden if self.needs_tokens else 0
        return 4 * (int(self.budget * (1 + CLOSE)) + (stream if 4 * stream > IN_MEMORY else 0))

    def check(self) -> None:
        """Raise UsageError or CheckpointError where experts cannot be stacked or ``keep`` cannot be met."""
        self.stacks = {}
        for index, names in self.by_block().items():
            path = self.model.block_path(index)
            found: dict[tuple[str, str], list[int]] = {}
            for name in names:
                match = _EXPERT.fullmatch(f"{path}.{name}")
                assert match is not None  # _select let nothing else through
                found.setdefault((match[1], match[3]), []).append(int(match[2]))
            self.stacks[index] = [self._target(*key, experts) for key, experts in found.items()]

    def _select(self) -> list[str]:
        kinds = ("gate_proj", "up_proj", "down_proj") if self.own.expert_down else ("gate_proj", "up_proj")
        every = super()._select()
        matches = [(name, _EXPERT.fullmatch(name)) for name in every]
        chosen = [name for name, match in matches if match is not None and match[3] in kinds]
        if not chosen:
            model_type = self.checkpoint.config.get("model_type")
            raise UsageError(
                f"--method td-moe takes the experts of mixture-of-experts layers, and none of the linears chosen of "
                f"this {model_type!r} model is one; choose another method, other blocks, or loosen --include and "
                "--exclude."
            )
        return chosen

    def _target(self, stem: str, kind: str, experts: list[int]) -> Target:
        every = [name for name in self.model.linears() if name.startswith(f"{stem}.") and name.endswith(f".{kind}")]
        if len(experts) != len(every):
            raise UsageError(
                f"--include and --exclude leave {len(experts)} of the {len(every)} experts in {stem} ({kind}), and "
                "td-moe decomposes the experts of a layer together; choose all of them or none."
            )
        names = [f"{stem}.{expert}.{kind}" for expert in range(len(every))]
        shapes = {self.checkpoint.store.find(f"{name}.weight").ref.shape for name in names}
        if len(shapes) > 1:
            raise CheckpointError(
                f"{self.checkpoint.path}: the experts in {stem} have {kind} of unequal shapes "
                f"({', '.join(str(list(shape)) for shape in sorted(shapes))}); they cannot be stacked: write the model "
                "again, or leave that layer out with --exclude."
            )
        (out_features, in_features) = shapes.pop()
        stack = Stack(f"{stem} ({kind})", len(every), out_features, in_features)
        stack.check(self.own.keep)
        return Target(stem, kind, stack)

    def run(self, scratch: Scratch, clock: Clock, progress: Progress) -> Result:
        """See Job."""
        made = _Made(self, scratch)
        with clock.stage("calibration text"):
            windows, texts = self.windows(progress)
        with clock.stage("decomposition"), progress.task("decomposing experts", 1 + max(self.stacks)) as advance:
            hidden = torch.zeros(0)
            if self.needs_tokens:
                shape = (*windows.shape, self.model.hidden)
                hidden = self.model.embed(windows, scratch.working_array("stream", shape))
            for index in range(1 + max(self.stacks)):
                targets = self.stacks.get(index, [])
                if targets or self.needs_tokens:
                    with self.model.block(index) as layer:
                        statistics = self._advance(layer, index, hidden, targets)
                        for target in targets:
                            made.add(target, *self._decompose(layer, index, target, statistics))
                advance(1)
        far = [target.stack.name for target, kept in made.kept.items() if abs(kept / self.own.keep - 1) > CLOSE]
        if far:
            shares = sorted(made.kept[target] for target in made.kept)
            progress.note(
                f"ranks are multiples of 8: {len(far)} of {len(made.kept)} stacks, such as {far[0]}, cannot keep "
                f"{self.own.keep:g} to half a percent; kept are {shares[0]:.4f} to {shares[-1]:.4f}"
            )
        return Result(tuple(made.layers[name] for name in self.targets), texts, made.factors, made.tensors)

    def _advance(self, layer: nn.Module, index: int, hidden: torch.Tensor, targets: list[Target]) -> _Statistics:
        """Run the block on the stream, which is overwritten, and measure what its targets read and give."""
        inputs, outputs = WHITENINGS[self.own.whitening]
        statistics = _Statistics(self.model.block_path(index), targets, inputs, outputs)
        if self.needs_tokens:
            with torch.no_grad(), statistics.listening(layer):
                for part in batches(len(hidden), self.settings.batch):
                    hidden[part] = self.model.run(layer, index, hidden[part])
        return statistics

    def _decompose(
        self, layer: nn.Module, index: int, target: Target, statistics: _Statistics
    ) -> tuple[tuple[int, int], Factors]:
        prefix = f"{self.model.block_path(index)}."
        weights = []
        for name in target.linears:
            linear = layer.get_submodule(name.removeprefix(prefix))
            assert isinstance(linear, nn.Linear)
            weights.append(linear.weight.detach())
        gram, metric = statistics.of(target, self.settings.input_damping, self.settings.output_damping)
        found = spectra(weights, gram, metric)
        ranks = choose(target.stack, self.own.keep, found.in_values.numpy(), found.out_values.numpy())
        return ranks, decompose(found, *ranks)


class _Statistics:
    """Second moments of the inputs and outputs of targets, each over the (token, expert) pairs that meet."""

    def __init__(self, path: str, targets: list[Target], inputs: bool, outputs: bool) -> None:
        self.path, self.targets = path, targets
        self.inputs = {target: Gram(target.stack.in_features) for target in targets} if inputs else {}
        self.outputs = {target: Gram(target.stack.out_features) for target in targets} if outputs else {}

    @contextmanager
    def listening(self, layer: nn.Module) -> Iterator[None]:
        """While open, hear the targets' linears in ``layer``."""
        handles = []
        for target in self.targets:
            for name in target.linears:
                module = layer.get_submodule(name.removeprefix(f"{self.path}."))
                handles.append(module.register_forward_hook(self._hear(target)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hear(self, target: Target) -> Any:
        def hear(_module: nn.Module, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            for grams, rows in ((self.inputs, given[0]), (self.outputs, output)):
                if target in grams and len(rows):
                    grams[target].add(rows.detach())

        return hear

    def of(
        self, target: Target, input_damping: float, output_damping: float
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """S of the inputs, damped, and F, the inverse of that of the outputs; None where they are not asked for."""
        gram = damped(self.inputs[target].mean(), input_damping) if target in self.inputs else None
        if target not in self.outputs:
            return gram, None
        return gram, torch.linalg.inv(damped(self.outputs[target].mean(), output_damping))


class _Made:
    """What the run leaves: IR, factors (in the scratch until they are written), the report of every linear."""

    def __init__(self, job: TdMoeJob, scratch: Scratch) -> None:
        self.job, self.scratch = job, scratch
        self.factors: dict[str, FactorizedLinear] = {}
        self.tensors: list[NewTensor] = []
        self.layers: dict[str, LayerReport] = {}
        self.kept: dict[Target, float] = {}

    def add(self, target: Target, ranks: tuple[int, int], factors: Factors) -> None:
        """Keep the factors of ``target`` and report its linears, each with its part of what they share."""
        names, stack = target.linears, target.stack
        dtype = self.job.dtype(names[0])
        shared = target.shared
        self._keep(shared[0], dtype, factors.u_in)
        self._keep(shared[1], dtype, factors.u_out)
        total = stack.parameters(*ranks)
        self.kept[target] = total / stack.dense
        for expert, name in enumerate(names):
            core = f"{name}.core"
            self._keep(core, dtype, factors.cores[expert])
            self.factors[name] = build.tucker2(
                name,
                stack.in_features,
                stack.out_features,
                *ranks,
                dtype=dtype,
                names=(shared[0], core, shared[1]),
                method="td-moe",
            )
            params = total * (expert + 1) // stack.experts - total * expert // stack.experts
            dense = stack.out_features * stack.in_features
            self.layers[name] = LayerReport(
                name,
                stack.out_features,
                stack.in_features,
                "td-moe",
                params,
                params / dense,
                factors.errors[expert],
                ranks=ranks,
            )

    def _keep(self, name: str, dtype: str, values: torch.Tensor) -> None:
        self.scratch.put(name, np.ascontiguousarray(values.numpy(), np.float32))

        def produce() -> np.ndarray[Any, Any]:
            return self.scratch.get(name).astype(numpy_dtype(dtype))

        self.tensors.append(NewTensor(name, dtype, tuple(values.shape), produce))
