"""LASER: truncated SVDs of the weights whose truncation lowers the loss, or of all that are targeted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from mixt_export.checkpoints import NewTensor
from mixt_export.checkpoints.dtypes import numpy_dtype
from mixt_export.compression.clock import Clock
from mixt_export.compression.families import LaserOptions
from mixt_export.compression.job import Job, Result
from mixt_export.compression.laser.search import Search
from mixt_export.compression.report import LayerReport, SearchReport
from mixt_export.compression.request import Request
from mixt_export.compression.scratch import Scratch
from mixt_export.errors import CheckpointError, UsageError
from mixt_export.network import FactorizedLinear, build
from mixt_export.progress import Progress


class LaserJob(Job):
    """See the module and Job."""

    def __init__(self, request: Request) -> None:
        assert isinstance(request.own, LaserOptions)
        self.own = request.own
        if not self.own.rho or not all(0.0 < rho <= 1.0 for rho in self.own.rho):
            raise UsageError("--rho: give shares of the full rank, above 0 and up to 1, such as 0.1.")
        if not self.own.search and len(set(self.own.rho)) > 1:
            raise UsageError("--no-search truncates every targeted linear to one --rho; give exactly one.")
        if self.own.search_windows < 1 or not self.own.minutes > 0:
            raise UsageError("--search-windows is at least 1, and --minutes above 0.")
        super().__init__(request)
        self.settings = replace(self.settings, windows=2 * self.own.search_windows)

    @property
    def needs_tokens(self) -> bool:
        """See Job."""
        return self.own.search

    @property
    def recipe(self) -> dict[str, Any]:
        """See Job."""
        return {
            "rho": sorted(set(self.own.rho)),
            "search": self.own.search,
            "search_windows": self.own.search_windows,
            "minutes": self.own.minutes,
        }

    @property
    def budget(self) -> int:
        """See Job; a search may leave everything as it is."""
        if self.own.search:
            return self.dense
        return sum(self._stored(name, self._rank(name, self.own.rho[0])) for name in self.targets)

    @property
    def scratch_bytes(self) -> int:
        """Both factors of every linear at full rank, and the inputs of every targeted block; float32."""
        factors = sum(min(self.shape(name)) * sum(self.shape(name)) for name in self.targets)
        hidden = int(self.checkpoint.config.get("hidden_size", 0))
        return 4 * (factors + len(self.by_block()) * self.settings.windows * self.settings.window * hidden)

    def check(self) -> None:
        """See Job: the options were checked before."""

    def run(self, scratch: Scratch, clock: Clock, progress: Progress) -> Result:
        """See Job."""
        with clock.stage("calibration text"):
            windows, texts = self.windows(progress)
        with clock.stage("decomposition"):
            energies = self._decompose(scratch, progress)
        if not self.own.search:
            ranks = {name: self._rank(name, self.own.rho[0]) for name in self.targets}
            return self._result(ranks, {}, energies, scratch, (), None)
        if len(windows) < 2:
            raise UsageError(
                "LASER needs two windows of text, one to search on and one to check; give more with --calib."
            )
        targets = {
            index: [f"{self.model.block_path(index)}.{name}" for name in names]
            for index, names in self.by_block().items()
        }

        def product(name: str, rank: int) -> torch.Tensor:
            return torch.from_numpy(_product(scratch, name, rank))

        searched, checked = windows[0::2], windows[1::2]
        search = Search(self.model, targets, searched, product, scratch, self.settings.batch, 60.0 * self.own.minutes)
        tried = {name: [self._rank(name, rho) for rho in self.own.rho] for name in self.targets}
        with clock.stage("search"):
            found = search.run(tried, progress)
        with clock.stage("check"):
            before = search.loss(checked, {})
            after = search.loss(checked, found.ranks) if found.ranks else before
        if not found.finished:
            progress.note(f"the search ended after {self.own.minutes:g} minutes and {found.trials} trials (--minutes)")
        if not found.ranks:
            progress.note("no truncation lowers the loss on the texts: nothing is changed")
        report = SearchReport(found.trials, found.finished, found.before, found.after, before, after)
        return self._result(found.ranks, found.gains, energies, scratch, texts, report)

    def _rank(self, name: str, rho: float) -> int:
        return max(1, int(rho * min(self.shape(name))))

    def _stored(self, name: str, rank: int) -> int:
        """Parameters of the linear at ``rank``: of its factors where they are fewer than the matrix has."""
        out_features, in_features = self.shape(name)
        return min(rank * (out_features + in_features), out_features * in_features)

    def _decompose(self, scratch: Scratch, progress: Progress) -> dict[str, np.ndarray[Any, Any]]:
        """Squared singular values of every linear; balanced factors go to the scratch (``up:``, ``down:``)."""
        energies = {}
        with progress.task("decomposing weights", len(self.targets)) as advance:
            for index, names in self.by_block().items():
                with self.model.block(index) as block:
                    for inside in names:
                        name = f"{self.model.block_path(index)}.{inside}"
                        linear = block.get_submodule(inside)
                        assert isinstance(linear, nn.Linear)
                        try:
                            u, s, v = torch.linalg.svd(linear.weight.double(), full_matrices=False)
                        except RuntimeError as error:  # what torch's LinAlgError is
                            raise CheckpointError(f"{name}: its singular values do not converge ({error}).") from error
                        scratch.put(f"up:{name}", (u * s.sqrt()).float().numpy())
                        scratch.put(f"down:{name}", (s.sqrt()[:, None] * v).float().numpy())
                        energies[name] = s.square().numpy()
                        advance(1)
        return energies

    def _result(
        self,
        ranks: Mapping[str, int],
        gains: Mapping[str, float],
        energies: Mapping[str, np.ndarray[Any, Any]],
        scratch: Scratch,
        texts: Any,
        search: SearchReport | None,
    ) -> Result:
        layers, factors, tensors = [], {}, []
        for name in self.targets:
            out_features, in_features = self.shape(name)
            dense, rank = out_features * in_features, ranks.get(name)
            method, params, error = "dense", dense, 0.0
            if rank is not None:
                params = self._stored(name, rank)
                total = float(energies[name].sum())
                error = float(energies[name][rank:].sum()) / total if total > 0 else 0.0
                method = "low_rank" if params < dense else "edited"
                if params < dense:
                    factors[name], new = self._factors(name, rank, scratch)
                else:
                    new = [self._edited(name, rank, scratch)]
                tensors += new
            tail = None if name not in gains else -gains[name]
            layers.append(
                LayerReport(
                    name, out_features, in_features, method, params, params / dense, error, rank=rank, loss_tail=tail
                )
            )
        return Result(tuple(layers), texts, factors, tensors, search=search)

    def _factors(self, name: str, rank: int, scratch: Scratch) -> tuple[FactorizedLinear, list[NewTensor]]:
        out_features, in_features = self.shape(name)
        dtype, store = self.dtype(name), self.checkpoint.store
        linear = build.low_rank(name, in_features, out_features, rank, dtype=dtype, method="laser")
        if f"{name}.bias" in store:
            linear = replace(linear, bias=store[f"{name}.bias"].ref)
        down, up = (core.tensor for core in linear.branches[0].cores)

        def produce(key: str, kept: Any) -> Any:
            return lambda: np.ascontiguousarray(scratch.get(key)[kept].T).astype(numpy_dtype(dtype))

        return linear, [
            NewTensor(down.name, dtype, down.shape, produce(f"down:{name}", np.s_[:rank])),
            NewTensor(up.name, dtype, up.shape, produce(f"up:{name}", np.s_[:, :rank])),
        ]

    def _edited(self, name: str, rank: int, scratch: Scratch) -> NewTensor:
        """The truncated matrix itself, where factors would be larger than it, in the layout that it is stored in."""
        stored = self.checkpoint.store[f"{name}.weight"].ref
        flipped = self.model.flipped(name)

        def produce() -> np.ndarray[Any, Any]:
            product = _product(scratch, name, rank)
            return np.ascontiguousarray(product.T if flipped else product).astype(numpy_dtype(stored.dtype))

        return NewTensor(f"{name}.weight", stored.dtype, stored.shape, produce)


def _product(scratch: Scratch, name: str, rank: int) -> np.ndarray[Any, Any]:
    """The truncated weight (out, in) float32."""
    product: np.ndarray[Any, Any] = scratch.get(f"up:{name}")[:, :rank] @ scratch.get(f"down:{name}")[:rank]
    return product
