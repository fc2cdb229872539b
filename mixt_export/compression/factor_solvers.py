"""Where the factors of one linear come from when a model is compressed block after block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from mixt_export.compression.closed_form import anchored_target, damped, decompose, quadratic_error, updated
from mixt_export.compression.scratch import Scratch
from mixt_export.compression.settings import Settings

Metric = Callable[[str], torch.Tensor | None]
"""Path of a linear -> the Fisher matrix of its output (out, out), or None: the identity."""


@dataclass(frozen=True)
class Seen:
    """Second moments of what a linear reads: x in the dense model, x' in the compressed one; (in, in) float64.

    ``after`` mean x' x'ᵀ, ``drift`` mean (x - x') x'ᵀ, ``spread`` mean (x - x') (x - x')ᵀ: of differences, since x and
    x' are close in early blocks and at high ranks, where differences of moments would be rounding.
    """

    after: torch.Tensor
    drift: torch.Tensor
    spread: torch.Tensor

    def error(self, weight: torch.Tensor, product: torch.Tensor) -> float:
        """mean ||W x - W' x'||² / mean ||W x||² of ``weight`` W and its replacement ``product`` W', (out, in)."""
        w = weight.double()
        drifted, own = w @ self.drift, quadratic_error(w, self.spread)

        def against(product: torch.Tensor) -> float:
            # W x - W' x' = W (x - x') + (W - W') x'
            change = w - product.double()
            return own + 2 * float((drifted * change).sum()) + quadratic_error(change, self.after)

        energy = against(torch.zeros_like(w))
        return max(0.0, against(product) / energy) if energy > 0.0 else 0.0


@dataclass(frozen=True)
class Factors:
    """W' = ``up`` (out, rank) · ``down`` (rank, in). ``tail``: what the objective lost; ``error``: see LayerReport."""

    up: torch.Tensor
    down: torch.Tensor
    tail: float
    error: float


class FactorSolver(Protocol):
    """``reads_inputs``: whether ``solve`` gets moments of X and X', for which a pass over the tokens is made."""

    @property
    def reads_inputs(self) -> bool:
        """See the class."""

    def solve(self, name: str, weight: torch.Tensor, rank: int, seen: Seen | None) -> Factors:
        """Factors of the linear at path ``name`` with ``weight`` (out, in)."""


@dataclass(frozen=True)
class Stored:
    """Factors that were computed before, in ``scratch`` as ``up:`` and ``down:`` + path, of which ``rank`` are kept.

    ``known``: path, rank -> tail and error.
    """

    scratch: Scratch
    known: Callable[[str, int], tuple[float, float]]
    reads_inputs = False

    def solve(self, name: str, weight: torch.Tensor, rank: int, seen: Seen | None) -> Factors:
        """See FactorSolver."""
        return Factors(*self.factors(name, rank), *self.known(name, rank))

    def factors(self, name: str, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, rank) and (rank, in) float32."""
        up, down = (torch.from_numpy(self.scratch.get(f"{side}:{name}")) for side in ("up", "down"))
        return up[:, :rank], down[:rank]


@dataclass(frozen=True)
class _OnShiftedInputs:
    """What solvers that see X' share. ``anchored``: the wanted output is W X, else W X'."""

    settings: Settings
    metric: Metric
    anchored: bool
    reads_inputs = True

    def problem(
        self, name: str, weight: torch.Tensor, seen: Seen
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Target T (out, in), Gram S (in, in) and output metric F of min tr(F (W' - T) S (W' - T)ᵀ)."""
        damping = self.settings.anchor_damping if self.anchored else self.settings.input_damping
        target = anchored_target(weight, seen.drift, seen.after, damping) if self.anchored else weight.double()
        metric = self.metric(name)
        outer = None if metric is None else damped(metric, self.settings.output_damping)
        return target, damped(seen.after, damping), outer


@dataclass(frozen=True)
class Truncated(_OnShiftedInputs):
    """The optimum of objectives 3 (shift-aware) and 4 (anchored) of AA-SVD. ``root``: see roots.ROOTS."""

    root: str

    def solve(self, name: str, weight: torch.Tensor, rank: int, seen: Seen | None) -> Factors:
        """See FactorSolver."""
        assert seen is not None
        target, gram, outer = self.problem(name, weight, seen)
        found = decompose(target, gram, outer, rank, root=self.root)
        tail = float(found.loss[rank:].sum()) * loss_scale(outer)
        return Factors(found.up, found.down, tail, seen.error(weight, found.up @ found.down))


@dataclass(frozen=True)
class Updated(_OnShiftedInputs):
    """Factors that were computed before, then updated on X': SVD-LLM's sequential update (closed_form.updated)."""

    stored: Stored

    def solve(self, name: str, weight: torch.Tensor, rank: int, seen: Seen | None) -> Factors:
        """See FactorSolver."""
        assert seen is not None
        target, gram, outer = self.problem(name, weight, seen)
        up, down = updated(target, gram, outer, *self.stored.factors(name, rank))
        difference = up @ down - target
        weighed = difference if outer is None else outer @ difference
        tail = float(((weighed @ gram) * difference).sum()) * loss_scale(outer)
        return Factors(up, down, tail, seen.error(weight, up @ down))


def loss_scale(metric: object | None) -> float:
    """Half the Fisher quadratic form is the second order of the loss; without it the form is the squared error."""
    return 1.0 if metric is None else 0.5
