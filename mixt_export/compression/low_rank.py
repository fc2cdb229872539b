"""The low rank methods: statistics of the dense model, ranks, factors; block after block where X' is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mixt_export.checkpoints import NewTensor
from mixt_export.checkpoints.dtypes import numpy_dtype
from mixt_export.compression import ranks as allocation
from mixt_export.compression.clock import Clock
from mixt_export.compression.families import LowRankOptions
from mixt_export.compression.job import Job, Result, Windows
from mixt_export.compression.method import RANK_RULES, SEQUENTIAL, LowRankMethod, choose_objective
from mixt_export.compression.profile import LinearProfile, Profiler
from mixt_export.compression.ranks import Candidate, Ranks
from mixt_export.compression.report import LayerReport
from mixt_export.compression.request import Request
from mixt_export.compression.scratch import IN_MEMORY, Scratch
from mixt_export.compression.sequential import SequentialCompressor
from mixt_export.errors import UsageError
from mixt_export.network import FactorizedLinear, TensorRef, build
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
        super().__init__(request)

    @property
    def pairs_tokens(self) -> bool:
        """See Job."""
        return self._is_sequential

    @property
    def needs_tokens(self) -> bool:
        """See Job."""
        return self.method.fisher or self.objective != "input-agnostic"

    @property
    def recipe(self) -> dict[str, Any]:
        """See Job."""
        return {"objective": self.objective, "ranks": self.rule, "keep": self.own.keep}

    @property
    def budget(self) -> int:
        """See Job."""
        return int(self.own.keep * self.dense)

    @property
    def scratch_bytes(self) -> int:
        """Factors at full length, Fisher matrices, Grams and block inputs, float32."""
        shapes = [self.shape(name) for name in self.targets]
        settings = self.settings
        factors = sum(out_features * in_features for out_features, in_features in shapes)
        hidden = self.model.hidden
        stream = settings.windows * settings.window * hidden
        streams = 2 * stream if 4 * stream > IN_MEMORY else 0
        if not self.method.fisher:
            return 4 * (factors + streams)
        squares = sum(out_features**2 + in_features**2 for out_features, in_features in shapes)
        boundary = settings.fisher_windows * settings.window * hidden
        return 4 * (factors + squares + streams + boundary * self.model.blocks)

    def check(self) -> None:
        """Raise UsageError for a file of ranks that does not fit."""
        if self.rule not in RANK_RULES:
            allocation.from_file(Path(self.rule), self.candidates({}))

    def run(self, scratch: Scratch, clock: Clock, progress: Progress) -> Result:
        """See Job."""
        with clock.stage("calibration text"):
            windows, texts = self.windows(progress)
        with clock.stage("statistics"):
            profiles = self._profile(windows, scratch, progress)
        with clock.stage("ranks"):
            chosen = self._allocate(profiles)
        with clock.stage("sequential"):
            measured = self._sequential(windows, chosen, scratch, progress)
        return Result(self._layers(profiles, chosen, measured), texts, *self._factors(chosen, scratch))

    def candidates(self, profiles: Mapping[str, LinearProfile]) -> list[Candidate]:
        """What the allocator sees of each linear, without losses where there is no profile."""
        return [
            profiles[name].candidate if name in profiles else Candidate(name, *self.shape(name), np.zeros(0))
            for name in self.targets
        ]

    @property
    def _is_sequential(self) -> bool:
        return self.objective in SEQUENTIAL

    def _profile(self, windows: Windows, scratch: Scratch, progress: Progress) -> dict[str, LinearProfile]:
        """Spectra and factors under the dense model; nothing where only the sequential pass is needed."""
        if self._is_sequential and not self.method.fisher and self.rule != "water-filling":
            return {}
        profiler = Profiler(
            self.model,
            self.by_block(),
            windows,
            self._max_ranks(),
            self.settings,
            scratch,
            progress,
            input_aware=self.objective != "input-agnostic",
            fisher=self.method.fisher,
        )
        return profiler.run()

    def _max_ranks(self) -> dict[str, int]:
        """How many directions each linear may turn out to need."""
        if self.rule == "water-filling":
            return {candidate.name: candidate.max_rank for candidate in self.candidates({})}
        return {name: rank or 0 for name, rank in self._allocate({}).items()}

    def _allocate(self, profiles: Mapping[str, LinearProfile]) -> Ranks:
        candidates = self.candidates(profiles)
        if self.rule == "uniform":
            return allocation.uniform(candidates, self.own.keep)
        if self.rule == "water-filling":
            return allocation.water_filling(candidates, self.own.keep, self.settings.rank_floor)
        return allocation.from_file(Path(self.rule), candidates)

    def _sequential(
        self, windows: Windows, ranks: Ranks, scratch: Scratch, progress: Progress
    ) -> SequentialCompressor | None:
        if not self._is_sequential:
            return None

        def fisher(name: str) -> torch.Tensor | None:
            return torch.from_numpy(scratch.get(f"fisher:{name}")) if self.method.fisher else None

        compressor = SequentialCompressor(
            self.model,
            self.by_block(),
            windows,
            ranks,
            self.settings,
            scratch,
            progress,
            anchored=self.objective == "anchored",
            fisher=fisher,
        )
        compressor.run()
        return compressor

    def _layers(
        self, profiles: Mapping[str, LinearProfile], ranks: Ranks, measured: SequentialCompressor | None
    ) -> tuple[LayerReport, ...]:
        layers = []
        for name in self.targets:
            out_features, in_features = self.shape(name)
            rank = ranks[name]
            if measured is not None:
                tail, error = measured.tails[name], measured.errors[name]
            elif rank is None:
                tail, error = 0.0, 0.0
            else:
                profile = profiles[name]
                tail = float(profile.candidate.loss[rank:].sum())
                error = float(profile.error[rank:].sum()) / profile.energy if profile.energy > 0 else 0.0
            params = out_features * in_features if rank is None else rank * (out_features + in_features)
            layers.append(
                LayerReport(
                    name,
                    out_features,
                    in_features,
                    "dense" if rank is None else "low_rank",
                    params,
                    params / (out_features * in_features),
                    error,
                    rank=rank,
                    loss_tail=tail,
                )
            )
        return tuple(layers)

    def _factors(self, ranks: Ranks, scratch: Scratch) -> tuple[dict[str, FactorizedLinear], list[NewTensor]]:
        """The IR of every factorised linear and its cores, produced from the scratch when they are written."""
        factors: dict[str, FactorizedLinear] = {}
        tensors: list[NewTensor] = []
        store = self.checkpoint.store
        for name, rank in ranks.items():
            if rank is None:
                continue
            out_features, in_features = self.shape(name)
            linear = build.low_rank(
                name, in_features, out_features, rank, dtype=self.dtype(name), method=self.method.name
            )
            if f"{name}.bias" in store:
                linear = replace(linear, bias=store[f"{name}.bias"].ref)
            factors[name] = linear
            first, second = (core.tensor for core in linear.branches[0].cores)
            tensors.append(_new_tensor(first, scratch, f"down:{name}", np.s_[:rank]))
            tensors.append(_new_tensor(second, scratch, f"up:{name}", np.s_[:, :rank]))
        return factors, tensors


def _new_tensor(ref: TensorRef, scratch: Scratch, key: str, kept: Any) -> NewTensor:
    """A core: the kept directions of a stored factor, transposed to the layout of the IR."""

    def produce() -> np.ndarray[Any, Any]:
        return np.ascontiguousarray(scratch.get(key)[kept].T).astype(numpy_dtype(ref.dtype))

    return NewTensor(ref.name, ref.dtype, ref.shape, produce)
