"""Tuning of a recovery; the defaults are what docs/recover.md measured."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mixt_export.errors import UsageError


@dataclass(frozen=True)
class RecoverSettings:
    """How long, on what, and how.

    ``steps`` optimiser steps on ``batch`` windows of ``window`` tokens, out of ``windows`` training windows in all.
    ``held_out`` windows from the end of each training text are never trained on: they choose the best step.
    ``eval_windows`` of each evaluation text are measured before and after and choose nothing.

    ``matrix_rate``: relative step length of factors that are matrices, None for ``rate_for`` of the student's size;
    ``learning_rate``: of Adam, for all else (see optimiser.py); both after a linear ``warm_up`` (share of the steps),
    then along a cosine down to ``final`` of them.
    ``common`` tokens stand in every step's vocabulary, with the true next tokens and the teacher's ``likely`` best at
    every position; ``others`` more are drawn from the rest (see vocabulary.py). ``hidden_weight``: of the relative
    squared error of the final hidden state beside the divergence. Held-out windows are measured ``checks`` times;
    after ``patience`` checks in a row without a new best the run ends.
    """

    steps: int = 120
    batch: int = 2
    window: int = 512
    windows: int = 96
    held_out: int = 2
    eval_windows: int = 2
    matrix_rate: float | None = None
    learning_rate: float = 2e-3
    warm_up: float = 0.05
    final: float = 0.02
    common: int = 2048
    likely: int = 8
    others: int = 512
    hidden_weight: float = 0.0
    checks: int = 6
    patience: int = 3

    def __post_init__(self) -> None:
        """Raise UsageError naming the first setting that makes no sense."""
        least = {"steps": 1, "batch": 1, "window": 2, "windows": 1, "held_out": 1, "eval_windows": 1}
        least |= {"common": 1, "likely": 1, "others": 1, "checks": 1, "patience": 1}
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise UsageError(f"{name.replace('_', ' ')} is {getattr(self, name)}; it must be at least {minimum}.")
        for name in ("matrix_rate", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < float("inf"):
                raise UsageError(f"{name.replace('_', ' ')} is {getattr(self, name)}; it must be positive.")
        if not 0.0 <= self.hidden_weight < float("inf"):
            raise UsageError(f"hidden weight is {self.hidden_weight}; it cannot be negative.")
        for name in ("warm_up", "final"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise UsageError(f"{name.replace('_', ' ')} is {getattr(self, name)}; it is a share of 1.")


def rate_for(kept: float) -> float:
    """``matrix_rate`` for factors that keep the share ``kept`` of their linears' parameters.

    The more a factor holds, the closer it starts to the teacher and the less of a step it bears: measured best were
    0.01 at 1/16 (MixT, N_T = 4) and 0.003 at 1/2 (N_T = 2). This is the power law through both, 0.01 at most.
    """
    slope = math.log(0.003 / 0.01) / math.log((1 / 2) / (1 / 16))
    rate: float = 0.003 * (2 * kept) ** slope
    return min(0.01, rate)
