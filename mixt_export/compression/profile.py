"""What the dense model's statistics say about its linears: spectra, and factors of every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from mixt_export.compression.allocation import Candidate
from mixt_export.compression.blocks import BlockwiseModel
from mixt_export.compression.clock import Clock
from mixt_export.compression.closed_form import activation_metric, damped, decompose, quadratic_error
from mixt_export.compression.gather import Gatherer, Statistics
from mixt_export.compression.roots import require_finite
from mixt_export.compression.scratch import Scratch
from mixt_export.compression.settings import Settings
from mixt_export.compression.statistics_cache import StatisticsCache
from mixt_export.progress import Progress


@dataclass(frozen=True)
class LinearProfile:
    """One linear under the dense model's statistics.

    ``candidate.loss`` and ``error`` (r,): what direction i carries of the objective and of the output error;
    ``energy``: mean ||W x||², what relative output errors are relative to. ``slope``: estimated increase of the loss,
    nats per token, per unit of the objective; None where no gradients were measured. ``tokens`` that were read.
    """

    candidate: Candidate
    error: np.ndarray
    energy: float
    slope: float | None = None
    tokens: int = 1

    def weighed(self, by: str) -> Candidate:
        """The candidate as a rule of allocation.WEIGHED sees it, but for "nothing"."""
        if by == "error":
            return replace(self.candidate, loss=self.error * self.tokens)
        if by == "relative":
            return replace(self.candidate, loss=self.error / self.energy if self.energy > 0 else self.error)
        assert self.slope is not None, "gradients were not asked for"
        return replace(self.candidate, loss=self.candidate.loss * self.slope)


class Profiler:
    """Decomposes every linear. ``targets``: block index -> names of the targeted linears inside the block.

    ``windows`` (windows, length) int64, without rows where no statistics are needed; ``max_ranks``: linear name -> how
    many directions of its factors to store. ``metric``: see method.INPUT_METRICS; ``alpha``: the diagonal one's power.
    ``gradients``: see gather; the output metric is the Fisher matrix where they are gather.FISHER. ``attended``: see
    attended.
    """

    def __init__(
        self,
        model: BlockwiseModel,
        targets: Mapping[int, Sequence[str]],
        windows: np.ndarray[Any, Any],
        max_ranks: Mapping[str, int],
        settings: Settings,
        scratch: Scratch,
        progress: Progress,
        clock: Clock,
        *,
        metric: str,
        gradients: str,
        cache: StatisticsCache,
        alpha: float = 0.5,
        attended: bool = False,
    ) -> None:
        self.model, self.targets, self.windows = model, targets, windows
        self.settings, self.scratch, self.progress = settings, scratch, progress
        self.max_ranks, self.metric, self.alpha = max_ranks, metric, alpha
        self.gradients, self.cache, self.clock = gradients, cache, clock
        self.attended = attended
        self.profiles: dict[str, LinearProfile] = {}

    def run(self) -> dict[str, LinearProfile]:
        """Profiles by linear name; factors of every rank below dense are in the scratch as ``up:``/``down:`` + name.

        So are the Fisher matrices that were measured, as ``fisher:`` + name.
        """
        if not len(self.windows):
            self._decompose_all(Statistics(None, None))
            return self.profiles
        gatherer = Gatherer(
            self.model,
            self.targets,
            self.windows,
            self.settings,
            self.scratch,
            self.progress,
            self.cache,
            self.gradients,
            self.attended,
        )
        with ExitStack() as held:
            with self.clock.stage("statistics"):
                statistics = held.enter_context(gatherer.run())
            self._decompose_all(statistics)
        return self.profiles

    def _decompose_all(self, statistics: Statistics) -> None:
        task = self.progress.task("decomposing weights", len(self.targets))
        with self.clock.stage("decomposition"), task as advance:
            for index, names in self.targets.items():
                with self.model.block(index) as layer:
                    for name in names:
                        self._decompose(layer, index, name, statistics)
                advance(1)

    def _decompose(self, layer: nn.Module, index: int, name: str, statistics: Statistics) -> None:
        weight = layer.get_submodule(name).weight
        assert isinstance(weight, torch.Tensor)
        out_features, in_features = weight.shape
        full = f"{self.model.block_path(index)}.{name}"
        gram, fisher = statistics.gram(full), statistics.fisher(full)
        outer = None if fisher is None else damped(fisher, self.settings.output_damping)
        used, error_by, seen = None, None, torch.eye(in_features, dtype=torch.float64)
        for statistic in (gram, fisher):
            if statistic is not None:
                require_finite(statistic, full)
        if gram is not None:
            used = seen = damped(gram, self.settings.input_damping)
            if self.metric == "identity":
                used, error_by = None, seen
            elif self.metric == "diagonal":
                magnitude = statistics.magnitude(full)
                assert magnitude is not None
                used, error_by = activation_metric(magnitude, self.alpha, self.settings.input_damping), seen
        result = decompose(weight, used, outer, self.max_ranks[full], root=self.metric, output_gram=error_by)
        self.scratch.put(f"up:{full}", result.up.float().numpy())
        self.scratch.put(f"down:{full}", result.down.float().numpy())
        if fisher is not None:
            self.scratch.put(f"fisher:{full}", fisher.numpy())
        scale = 1.0 if fisher is None else 0.5  # second order of the loss: half the Fisher quadratic form
        candidate = Candidate(full, out_features, in_features, scale * result.loss.numpy())
        self.profiles[full] = LinearProfile(
            candidate,
            result.error.numpy(),
            quadratic_error(weight, seen),
            _slope(out_features, fisher is not None, statistics.trace(full), gram, used),
            max(1, self.windows.size),
        )


def _slope(
    out_features: int, fisher: bool, trace: float | None, gram: torch.Tensor | None, metric: torch.Tensor | None
) -> float | None:
    """Nats per token per unit of the objective: the second order of the loss, ½ E (g · e)² of an output error e.

    Under the Fisher matrix that is the objective. Otherwise it is E ||e||² under ``metric`` of the input, and the
    gradient is taken to have no preferred direction: E (g · e)² = E ||g||² / out · E ||e||²; so is an error that the
    objective weighs by other second moments than the ``gram`` of the inputs.
    """
    if fisher:
        return 1.0
    if trace is None or gram is None:
        return None
    taken = float(gram.shape[0]) if metric is None else float(metric.sum() if metric.ndim == 1 else metric.trace())
    return 0.5 * trace / out_features * float(gram.double().trace()) / taken
