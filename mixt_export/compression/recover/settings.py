"""Tuning of a recovery; the defaults are what docs/recover.md measured."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mixt_export.errors import UsageError


@dataclass(frozen=True)
class RecoverSettings:
    """How long, on what, and how.

    ``steps`` optimiser steps on ``batch`` windows of ``window`` tokens, out of ``windows`` training windows in all;
    None: as many as the steps visit, or as the texts hold. ``held_out`` windows from the end of each training text, as
    many of each validation text and, where none is given, ``sampled`` windows of text that the teacher writes are
    never trained on: they choose the best step. ``eval_windows`` of each evaluation text are measured before and after
    and choose nothing.

    ``matrix_rate``: relative step length of factors that are matrices, None for ``rate_for`` of the student's size;
    ``learning_rate``: of Adam, for all else (see optimiser.py); both after a linear ``warm_up`` (share of the steps),
    then along a cosine down to ``final`` of them.
    ``common`` tokens stand in every step's vocabulary, with the true next tokens and the teacher's ``likely`` best in
    every window; ``others`` more are drawn from the rest (see vocabulary.py). ``hidden_weight``: of the relative
    squared error of the final hidden state beside the divergence. Held-out windows are measured ``checks`` times;
    after ``patience`` checks in a row without a new best the run ends.
    """

    steps: int = 100
    batch: int = 4
    window: int = 256
    windows: int | None = None
    held_out: int = 4
    sampled: int = 4
    eval_windows: int = 2
    matrix_rate: float | None = None
    learning_rate: float = 2e-3
    warm_up: float = 0.05
    final: float = 0.02
    common: int = 2048
    likely: int = 384
    others: int = 512
    hidden_weight: float = 0.0
    checks: int = 4
    patience: int = 2

    def __post_init__(self) -> None:
        """Raise UsageError naming the first setting that makes no sense."""
        least = {"steps": 1, "batch": 1, "window": 2, "windows": 1, "held_out": 1, "sampled": 0, "eval_windows": 1}
        least |= {"common": 1, "likely": 1, "others": 1, "checks": 1, "patience": 1}
        for name, minimum in least.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
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


def rate_for(kept: float, blocks: int = 4) -> float:
    """``matrix_rate`` for factors that keep the share ``kept`` of their linears' parameters, in ``blocks`` blocks.

    The closer a model is to its teacher the less of a step it bears, and what steps get wrong adds up over blocks like
    independent errors: 0.0137 (1 - kept) / sqrt(blocks). Measured: 0.003 is right for one half kept in 4 blocks, 0.001
    for 0.6 and 0.0005 for 0.8 in 30; three to four times as much is too much (docs/recover.md). Factors that keep all
    parameters or more count as 0.98.
    """
    return 0.0137 * max(0.02, 1.0 - kept) / math.sqrt(blocks)
