"""Methods that replace linears block after block: closed form, then refinement, and controls at equal footing."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from mixt_export.compression.clock import Clock
from mixt_export.compression.controls import COMPRESSED, DELETED, DENSE, LOW_RANK, Controls, TextScores
from mixt_export.compression.job import Job, Result, Windows
from mixt_export.compression.made import Made
from mixt_export.compression.refine import Refine, RefineSettings, refiner
from mixt_export.compression.report import BlockReport
from mixt_export.compression.request import Request
from mixt_export.compression.scratch import IN_MEMORY, Scratch
from mixt_export.compression.tensor_mixture.lockstep import Lockstep, Prepare, Variant
from mixt_export.compression.tensor_mixture.replacements import Solve, low_rank_solver
from mixt_export.compression.tensor_mixture.scoring import scores
from mixt_export.compression.texts import calibration_windows
from mixt_export.errors import UsageError
from mixt_export.network import FactorizedLinear
from mixt_export.progress import Progress
from mixt_export.sample.texts import EVALUATION, IN_DOMAIN

#: Domains of the shipped evaluation texts that controls are scored on, windows of each, tokens per window.
CONTROL_DOMAINS = ("addresses", "novel")
CONTROL_WINDOWS, CONTROL_WINDOW = 4, 512


class LockstepOptions(Protocol):
    """What the options of such a family share. ``refine_steps``: 0 for none, None for the default of refinement."""

    @property
    def refine_steps(self) -> int | None:
        """Steps of block refinement after the closed form."""

    @property
    def controls(self) -> bool:
        """Whether the result and its controls are measured on held-out texts."""


class LockstepJob(Job):
    """See the module and Job; a method says how one linear is replaced (`solver`)."""

    def __init__(self, request: Request, own: LockstepOptions) -> None:
        self._shared = own
        if own.refine_steps is not None and own.refine_steps < 0:
            raise UsageError(f"--refine-steps {own.refine_steps}: give 0 for none, or how many.")
        super().__init__(request)
        self._controlled = own.controls and self.model.predicts
        missing = [EVALUATION[domain] for domain in CONTROL_DOMAINS if not EVALUATION[domain].is_file()]
        if self._controlled and missing:
            raise UsageError(f"{missing[0]}: is not installed, and controls are scored on it; give --no-controls.")

    @abstractmethod
    def solver(self) -> tuple[Solve, Mapping[str, int]]:
        """How one linear is replaced, and the parameters of the replacement by module path, known by then at last."""

    @abstractmethod
    def describe(self, linear: FactorizedLinear) -> Mapping[str, Any]:
        """What a LayerReport says of this method's replacements beyond the usual."""

    def preparation(self, progress: Progress) -> Prepare | None:
        """What is done to every block before it is replaced; nothing by default."""
        return None

    @property
    def pairs_tokens(self) -> bool:
        """See Job."""
        return True

    @property
    def needs_tokens(self) -> bool:
        """See Job."""
        return True

    @property
    def refinement(self) -> RefineSettings | None:
        """How blocks are refined; None: not at all."""
        steps = self._shared.refine_steps
        if steps == 0:
            return None
        return RefineSettings() if steps is None else RefineSettings(steps=steps)

    @property
    def scratch_bytes(self) -> int:
        """Cores, changed vectors, and the streams that are too large for memory; float32."""
        hidden = self.model.hidden
        stream = self.settings.windows * self.settings.window * hidden
        streams = (3 if self._controlled else 2) * stream if 4 * stream > IN_MEMORY else 0
        return 4 * (self.budget + streams + len(self.targets) * hidden)

    def run(self, scratch: Scratch, clock: Clock, progress: Progress) -> Result:
        """See Job."""
        with clock.stage("calibration text"):
            windows, texts = self.windows(progress)
            held_out = self._held_out() if self._controlled else []
        made = Made(self, scratch, self.describe)
        refined: list[BlockReport] = []
        solve, params = self.solver()
        variants = {COMPRESSED: Variant(solve, self._refiner(refined), made.finish)}
        if self._controlled:
            variants[LOW_RANK] = Variant(low_rank_solver(params, self.settings), self._refiner([]), made.count)
            variants[DELETED] = Variant()
        with clock.stage("blocks"):
            outputs = self._blocks(windows, held_out, variants, scratch, progress)
        controls = None
        if self._controlled:
            with clock.stage("controls"):
                controls = self._controls(held_out, outputs, variants, made, progress)
        return Result(made.layers(), texts, made.factors, made.tensors, tuple(refined), controls)

    def _blocks(
        self,
        windows: Windows,
        held_out: Sequence[Windows],
        variants: Mapping[str, Variant],
        scratch: Scratch,
        progress: Progress,
    ) -> list[torch.Tensor]:
        """Replace in every block; the original's outputs on the held-out texts."""
        stream = self.model.embed(windows, scratch.working_array("stream", (*windows.shape, self.model.hidden)))
        outputs = [
            self.model.embed(tokens, np.zeros((*tokens.shape, self.model.hidden), np.float32)) for tokens in held_out
        ]

        def allocate(label: str, like: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(scratch.working_array(f"stream of {label}", tuple(like.shape)))

        prepare = self.preparation(progress)
        targets, batch = self.by_block(), self.settings.batch
        Lockstep(self.model, targets, variants, batch, allocate, progress, prepare).run(stream, outputs)
        return outputs

    def _held_out(self) -> list[Windows]:
        length = self.length(CONTROL_WINDOW)
        return [
            calibration_windows(
                self.checkpoint.path, [EVALUATION[domain]], CONTROL_WINDOWS, length, self.model.vocabulary
            )[0]
            for domain in CONTROL_DOMAINS
        ]

    def _refiner(self, reports: list[BlockReport]) -> Refine | None:
        """Refinement that appends what it did to ``reports``; None without steps."""
        return refiner(self.model, self.refinement, self.request.seed, reports)

    def _controls(
        self,
        tokens: Sequence[Windows],
        outputs: Sequence[torch.Tensor],
        variants: Mapping[str, Variant],
        made: Made,
        progress: Progress,
    ) -> Controls:
        streams = {DENSE: outputs, **{name: variant.held_out for name, variant in variants.items()}}
        found = scores(self.model, tokens, streams, progress)
        compressed = sum(layer.params for layer in made.layers())
        params = {DENSE: self.dense, COMPRESSED: compressed, LOW_RANK: made.low_rank_params, DELETED: 0}
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
