"""The low rank methods: statistics of the dense model, ranks, factors; block after block where X' is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mixt_export.compression.allocation import ALLOCATIONS, Candidate, Ranks, from_file
from mixt_export.compression.clock import Clock
from mixt_export.compression.factor_solvers import FactorSolver, Stored, Truncated, Updated
from mixt_export.compression.families import LowRankOptions
from mixt_export.compression.gather import FISHER, NONE, TRACES, gradient_windows
from mixt_export.compression.job import Job, Result, Windows
from mixt_export.compression.low_rank_layers import known_of, layer_reports, stored_factors
from mixt_export.compression.made import Made
from mixt_export.compression.method import SEQUENTIAL, LowRankMethod, check_adjustments, choose_objective
from mixt_export.compression.profile import LinearProfile, Profiler
from mixt_export.compression.refine import RefineSettings, refiner
from mixt_export.compression.remap import STORES, rank_price, remapped
from mixt_export.compression.report import BlockReport, TextReport
from mixt_export.compression.request import Request
from mixt_export.compression.scratch import IN_MEMORY, Scratch
from mixt_export.compression.sequential import SequentialCompressor
from mixt_export.errors import UsageError
from mixt_export.progress import Progress


class LowRankJob(Job):
    """See the module and Job."""

    def __init__(self, request: Request) -> None:
        assert isinstance(request.method, LowRankMethod)
        assert isinstance(request.own, LowRankOptions)
        self.method, self.own = request.method, request.own
        self.objective = choose_objective(self.method, self.own.objective)
        self.rule = self.method.ranks if str(self.own.ranks) == "auto" else str(self.own.ranks)
        if not 0.0 < self.own.keep <= 1.0:
            raise UsageError(
                f"--keep {self.own.keep:g} is not a share; give a number above 0 and up to 1, such as 0.9."
            )
        check_adjustments(self.method, self.objective, self.own)
        if self.own.store not in (None, *STORES):
            raise UsageError(f"--store {self.own.store!r} is unknown; choose {' or '.join(STORES)}, or leave it out.")
        super().__init__(request)

    @property
    def pairs_tokens(self) -> bool:
        """See Job."""
        return self._is_sequential or self.own.update is not None

    @property
    def needs_tokens(self) -> bool:
        """See Job."""
        adjusted = self.own.update is not None or self.refinement is not None
        return self._reads_inputs or adjusted

    @property
    def _reads_inputs(self) -> bool:
        """Whether factors or ranks depend on what linears read in the dense model."""
        return self.objective != "input-agnostic" or self.weighs != "nothing" or self.gradients != NONE

    @property
    def weighs(self) -> str:
        """What the rule of the ranks weighs, see allocation.WEIGHED."""
        return ALLOCATIONS[self.rule].weighs if self.rule in ALLOCATIONS else "nothing"

    @property
    def gradients(self) -> str:
        """What is measured of the gradients, see gather."""
        if self.method.fisher:
            return FISHER
        return TRACES if self.weighs == "loss" else NONE

    @property
    def attended(self) -> bool:
        """Whether value projections are judged behind the attention, see attended.py."""
        return bool(self.own.attended)

    @property
    def refinement(self) -> RefineSettings | None:
        """How blocks are refined; None: not at all."""
        steps = self.own.refine_steps
        return RefineSettings(steps=steps) if steps else None

    @property
    def recipe(self) -> dict[str, Any]:
        """See Job."""
        return {
            "objective": self.objective,
            "ranks": self.rule,
            "keep": self.own.keep,
            **({"asvd_alpha": self.own.asvd_alpha} if self.method.input_metric == "diagonal" else {}),
            "update": self.own.update,
            "attended": self.attended,
            "refine_steps": self.refinement.steps if self.refinement else 0,
            **({} if self.own.store is None else {"store": self.own.store}),
        }

    @property
    def budget(self) -> int:
        """See Job."""
        return int(self.own.keep * self.dense)

    @property
    def scratch_bytes(self) -> int:
        """Factors at full length, Grams, Fisher matrices and block inputs, float32; none of them from the cache."""
        shapes = [self.shape(name) for name in self.targets]
        settings, hidden = self.settings, self.model.hidden
        numbers = sum(out_features * in_features for out_features, in_features in shapes)
        if self.pairs_tokens or self.refinement:
            numbers *= 2  # those of the dense model's statistics, and those that are made of them
        stream = settings.windows * settings.window * hidden
        numbers += 2 * stream if 4 * stream > IN_MEMORY else 0
        if self.needs_tokens:
            numbers += sum(in_features**2 for _, in_features in shapes)  # half of it, or less where inputs are shared
        if self.gradients == FISHER:
            numbers += 2 * sum(out_features**2 for out_features, _ in shapes)
        numbers += gradient_windows(self.gradients, settings) * settings.window * hidden * self.model.blocks
        return 4 * numbers

    def check(self) -> None:
        """Raise UsageError for a file of ranks that does not fit."""
        if self.rule not in ALLOCATIONS:
            from_file(Path(self.rule), self.candidates({}))

    def run(self, scratch: Scratch, clock: Clock, progress: Progress) -> Result:
        """See Job."""
        with clock.stage("calibration text"):
            windows, texts = self.windows(progress)
        profiles = self._profile(windows, scratch, clock, progress)
        with clock.stage("ranks"):
            chosen = self._allocate(profiles)
        if not (self.pairs_tokens or self.refinement):
            known = {name: known_of(profiles, name, rank) for name, rank in chosen.items()}
            factors, tensors = stored_factors(self, chosen, scratch)
            result = Result(layer_reports(self, chosen, known), texts, factors, tensors, notes=self._notes(windows))
        else:
            with clock.stage("blocks"):
                result = self._by_blocks(windows, texts, profiles, chosen, scratch, progress)
        return result if self.own.store is None else remapped(result)

    def candidates(self, profiles: Mapping[str, LinearProfile]) -> list[Candidate]:
        """What the rule of the ranks sees of each linear, without losses where there is no profile."""
        found = [
            profiles[name].weighed(self.weighs)
            if name in profiles and self.weighs != "nothing"
            else Candidate(name, *self.shape(name), np.zeros(0))
            for name in self.targets
        ]
        if self.own.store is None:
            return found
        return [replace(each, price=rank_price(each.out_features, each.in_features)) for each in found]

    @property
    def _is_sequential(self) -> bool:
        return self.objective in SEQUENTIAL

    def _profile(
        self, windows: Windows, scratch: Scratch, clock: Clock, progress: Progress
    ) -> dict[str, LinearProfile]:
        """Spectra and factors under the dense model; nothing where only the sequential pass is needed."""
        if self._is_sequential and not self.method.fisher and self.weighs == "nothing":
            return {}
        profiler = Profiler(
            self.model,
            self.by_block(),
            windows if self._reads_inputs else windows[:0],
            self._max_ranks(),
            self.settings,
            scratch,
            progress,
            clock,
            metric="identity" if self.objective == "input-agnostic" else self.method.input_metric,
            gradients=self.gradients,
            cache=self.cache,
            alpha=self.own.asvd_alpha,
            attended=self.attended,
        )
        return profiler.run()

    def _max_ranks(self) -> dict[str, int]:
        """How many directions each linear may turn out to need."""
        if self.weighs != "nothing":
            return {candidate.name: candidate.max_rank for candidate in self.candidates({})}
        return {name: rank or 0 for name, rank in self._allocate({}).items()}

    def _allocate(self, profiles: Mapping[str, LinearProfile]) -> Ranks:
        candidates = self.candidates(profiles)
        if self.rule in ALLOCATIONS:
            return ALLOCATIONS[self.rule].choose(candidates, self.own.keep, self.settings.rank_floor)
        return from_file(Path(self.rule), candidates)

    def _by_blocks(
        self,
        windows: Windows,
        texts: tuple[TextReport, ...],
        profiles: Mapping[str, LinearProfile],
        ranks: Ranks,
        scratch: Scratch,
        progress: Progress,
    ) -> Result:
        """Factors that depend on X', or blocks that are refined: one pass over the model with both streams."""
        made = Made(self, scratch, lambda _linear: {})
        refined: list[BlockReport] = []
        compressor = SequentialCompressor(
            self.model,
            self.by_block(),
            windows,
            ranks,
            self.settings,
            scratch,
            progress,
            solver=self._solver(profiles, scratch),
            method=self.method.name,
            dtype=self.dtype,
            refine=refiner(self.model, self.refinement, self.request.seed, refined),
            finish=made.finish,
        )
        compressor.run()
        known = {name: (compressor.tails[name], compressor.errors[name]) for name in ranks}
        layers, notes = layer_reports(self, ranks, known), self._notes(windows)
        return Result(layers, texts, made.factors, made.tensors, tuple(refined), notes=notes)

    def _solver(self, profiles: Mapping[str, LinearProfile], scratch: Scratch) -> FactorSolver:
        def fisher(name: str) -> torch.Tensor | None:
            return torch.from_numpy(scratch.get(f"fisher:{name}")) if self.method.fisher else None

        if self._is_sequential:
            return Truncated(self.settings, fisher, self.objective == "anchored", self.method.input_metric)
        stored = Stored(scratch, lambda name, rank: known_of(profiles, name, rank))
        if self.own.update is None:
            return stored
        return Updated(self.settings, fisher, self.own.update == "anchored", stored)

    def _notes(self, windows: Windows) -> tuple[str, ...]:
        """Whether there were fewer tokens than a linear has inputs."""
        widest = max(self.shape(name)[1] for name in self.targets)
        if not 0 < windows.size < widest:
            return ()
        return (
            f"{windows.size} calibration tokens for linears of {widest} input features: their statistics have rank "
            f"{windows.size} at most and are damped; give at least {widest} tokens, better several times as many.",
        )
