"""Make MixT of a dense model: closed form and refinement block after block, and controls at equal footing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from mixt_export.checkpoints import NewTensor
from mixt_export.checkpoints.dtypes import numpy_dtype
from mixt_export.compression.clock import Clock
from mixt_export.compression.controls import COMPRESSED, DELETED, DENSE, LOW_RANK, Controls, TextScores
from mixt_export.compression.families import MixTOptions
from mixt_export.compression.job import Job, Result, Windows
from mixt_export.compression.permutation import GATED_MLP, permute_block
from mixt_export.compression.refine import RefineSettings, refine_block
from mixt_export.compression.report import BlockReport, LayerReport
from mixt_export.compression.request import Request
from mixt_export.compression.scratch import IN_MEMORY, Scratch
from mixt_export.compression.tensor_mixture.lockstep import Lockstep, Prepare, Refine, Variant
from mixt_export.compression.tensor_mixture.replacements import Replacement, low_rank_solver, mixt_solver
from mixt_export.compression.tensor_mixture.scoring import scores
from mixt_export.compression.tensor_mixture.sizes import mixt_of, terms_of
from mixt_export.compression.texts import calibration_windows
from mixt_export.errors import UsageError
from mixt_export.network import FactorizedLinear
from mixt_export.progress import Progress
from mixt_export.reference.tensors import torch_dtype
from mixt_export.sample.texts import EVALUATION, IN_DOMAIN

#: Domains of the shipped evaluation texts that controls are scored on, windows of each, tokens per window.
CONTROL_DOMAINS = ("addresses", "novel")
CONTROL_WINDOWS, CONTROL_WINDOW = 4, 512


class MixTJob(Job):
    """See the module and Job."""

    linears: dict[str, FactorizedLinear]

    def __init__(self, request: Request) -> None:
        assert isinstance(request.own, MixTOptions)
        self.own = request.own
        if self.own.refine_steps is not None and self.own.refine_steps < 0:
            raise UsageError(f"--refine-steps {self.own.refine_steps}: give 0 for none, or how many.")
        super().__init__(request)

    @property
    def needs_tokens(self) -> bool:
        """See Job."""
        return True

    @property
    def refinement(self) -> RefineSettings | None:
        """How blocks are refined; None: not at all."""
        steps = self.own.refine_steps
        if steps == 0:
            return None
        return RefineSettings() if steps is None else RefineSettings(steps=steps)

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
        return sum(_cores(linear) for linear in self.linears.values())

    @property
    def scratch_bytes(self) -> int:
        """Cores, changed vectors, and the streams that are too large for memory; float32."""
        hidden = int(self.checkpoint.config.get("hidden_size", 0))
        stream = self.settings.windows * self.settings.window * hidden
        streams = (3 if self.own.controls else 2) * stream if 4 * stream > IN_MEMORY else 0
        return 4 * (self.budget + streams + len(self.targets) * hidden)

    def check(self) -> None:
        """Raise UsageError where N_T does not fit a linear or the shipped texts for controls are not installed."""
        terms = terms_of(self.own.n_tensors, self.targets)
        shapes = {name: self.shape(name) for name in self.targets}
        dtypes = {name: self.dtype(name) for name in self.targets}
        self.linears = mixt_of(shapes, terms, dtypes, bond=self.own.bond, paper_padding=self.own.paper_padding)
        missing = [EVALUATION[domain] for domain in CONTROL_DOMAINS if not EVALUATION[domain].is_file()]
        if self.own.controls and missing:
            raise UsageError(f"{missing[0]}: is not installed, and controls are scored on it; give --no-controls.")

    def run(self, scratch: Scratch, clock: Clock, progress: Progress) -> Result:
        """See Job."""
        with clock.stage("calibration text"):
            windows, texts = self.windows(progress)
            held_out = self._held_out() if self.own.controls else []
        made = _Made(self, scratch)
        refined: list[BlockReport] = []
        variants = {
            COMPRESSED: Variant(mixt_solver(self.linears, self.settings), self._refiner(refined, clock), made.finish)
        }
        if self.own.controls:
            params = {name: _cores(linear) for name, linear in self.linears.items()}
            variants[LOW_RANK] = Variant(low_rank_solver(params, self.settings), self._refiner([], clock), made.count)
            variants[DELETED] = Variant()
        unmoved: list[int] = []
        with clock.stage("blocks"):
            shape = (*windows.shape, self.model.hidden)
            stream = self.model.embed(windows, scratch.working_array("stream", shape))
            outputs = [
                self.model.embed(tokens, np.zeros((*tokens.shape, self.model.hidden), np.float32))
                for tokens in held_out
            ]

            def allocate(label: str, like: torch.Tensor) -> torch.Tensor:
                return torch.from_numpy(scratch.working_array(f"stream of {label}", tuple(like.shape)))

            lockstep = Lockstep(
                self.model, self.by_block(), variants, self.settings.batch, allocate, progress, self._permuter(unmoved)
            )
            lockstep.run(stream, outputs)
        if unmoved:
            progress.note(
                f"blocks {', '.join(map(str, unmoved))} keep the order of their hidden channels: --permute needs gate, "
                "up and down replaced alike, in the exact form, without biases, and not too large"
            )
        controls = None
        if self.own.controls:
            with clock.stage("controls"):
                controls = self._controls(held_out, outputs, variants, made.low_rank_params, progress)
        return Result(made.layers(), texts, made.factors, made.tensors, tuple(refined), controls)

    def _held_out(self) -> list[Windows]:
        length = self.length(CONTROL_WINDOW)
        return [
            calibration_windows(
                self.checkpoint.path, [EVALUATION[domain]], CONTROL_WINDOWS, length, self.model.vocabulary
            )[0]
            for domain in CONTROL_DOMAINS
        ]

    def _permuter(self, unmoved: list[int]) -> Prepare | None:
        """Reorders the hidden channels of an MLP whose three linears all become MixT; None when not asked for.

        Blocks of which something is replaced in the MLP and whose order stays are appended to ``unmoved``.
        """
        if not self.own.permute:
            return None

        def permute(index: int, block: nn.Module, inputs: Iterable[torch.Tensor]) -> None:
            prefix = f"{self.model.block_path(index)}."
            inside = {
                name.removeprefix(prefix): linear for name, linear in self.linears.items() if name.startswith(prefix)
            }
            if not permute_block(block, inside, inputs) and any(name in inside for name in GATED_MLP):
                unmoved.append(index)

        return permute

    def _refiner(self, reports: list[BlockReport], clock: Clock) -> Refine | None:
        """Refinement that appends what it did to ``reports``; None without steps."""
        settings = self.refinement
        if settings is None:
            return None

        def refine(
            index: int, original: nn.Module, replaced: nn.Module, x: torch.Tensor, shifted: torch.Tensor
        ) -> None:
            found = refine_block(self.model, index, original, replaced, x, shifted, settings, self.request.seed + index)
            reports.append(BlockReport(index, found.steps, found.before, found.after))

        return refine

    def _controls(
        self,
        tokens: Sequence[Windows],
        outputs: Sequence[torch.Tensor],
        variants: Mapping[str, Variant],
        low_rank_params: int,
        progress: Progress,
    ) -> Controls:
        streams = {DENSE: outputs, **{name: variant.held_out for name, variant in variants.items()}}
        found = scores(self.model, tokens, streams, progress)
        params = {DENSE: self.dense, COMPRESSED: self.budget, LOW_RANK: low_rank_params, DELETED: 0}
        texts = tuple(
            TextScores(domain, self._relation(domain), len(windows), windows.shape[1], by_variant)
            for domain, windows, by_variant in zip(CONTROL_DOMAINS, tokens, found, strict=True)
        )
        return Controls.of(texts, params, self.request.method.name)

    def _relation(self, domain: str) -> str:
        """What a held-out text has to do with the calibration."""
        if self.request.calib:
            return "held out"
        return "in domain" if domain in IN_DOMAIN else "out of domain"


class _Made:
    """What the run leaves: IR, cores and changed vectors (in the scratch until they are written), errors."""

    def __init__(self, job: MixTJob, scratch: Scratch) -> None:
        self.job, self.scratch = job, scratch
        self.factors: dict[str, FactorizedLinear] = {}
        self.tensors: list[NewTensor] = []
        self.errors: dict[str, float] = {}
        self.low_rank_params = 0

    def finish(
        self, index: int, original: nn.Module, block: nn.Module, replacements: Mapping[str, Replacement]
    ) -> None:
        """Round what is new in ``block`` to its stored dtype and keep it."""
        path, store = self.job.model.block_path(index), self.job.checkpoint.store
        for found in replacements.values():
            name = found.linear.name
            linear = self.job.linears[name]
            bias = store[f"{name}.bias"].ref if f"{name}.bias" in store else None
            self.factors[name] = replace(linear, bias=bias)
            self.errors[name] = found.error
            for tensor in linear.core_tensors():
                self._keep(tensor.name, tensor.dtype, found.parameters[tensor.name])
        before = dict(original.named_parameters())
        for inside, parameter in block.named_parameters():
            if inside in before and not torch.equal(parameter, before[inside]):
                name = f"{path}.{inside}"
                self._keep(name, store[name].ref.dtype, parameter)

    def count(
        self, _index: int, _original: nn.Module, _block: nn.Module, replacements: Mapping[str, Replacement]
    ) -> None:
        """Round the low rank control as the compressed model is, and count its parameters."""
        for found in replacements.values():
            self.low_rank_params += _cores(found.linear)
            for tensor in found.linear.core_tensors():
                _round(found.parameters[tensor.name], self.job.dtype(found.linear.name))

    def layers(self) -> tuple[LayerReport, ...]:
        """The report of every linear."""
        found = []
        for name, linear in self.job.linears.items():
            dense = linear.out_features * linear.in_features
            params = _cores(linear)
            found.append(
                LayerReport(
                    name,
                    linear.out_features,
                    linear.in_features,
                    "mixt",
                    params,
                    params / dense,
                    self.errors[name],
                    terms=len(linear.branches),
                )
            )
        return tuple(found)

    def _keep(self, name: str, dtype: str, parameter: nn.Parameter) -> None:
        _round(parameter, dtype)
        self.scratch.put(name, parameter.detach().numpy())

        def produce() -> np.ndarray[Any, Any]:
            return self.scratch.get(name).astype(numpy_dtype(dtype))

        self.tensors.append(NewTensor(name, dtype, tuple(parameter.shape), produce))


def _cores(linear: FactorizedLinear) -> int:
    """Parameters without the bias, which the dense linear has too."""
    return sum(tensor.size for tensor in linear.core_tensors())


def _round(parameter: nn.Parameter, dtype: str) -> None:
    """To what ``dtype`` stores, in place: what runs on through the model is what will be loaded."""
    parameter.data.copy_(parameter.data.to(torch_dtype(dtype)).float())
