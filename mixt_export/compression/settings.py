"""Tuning of a run; the defaults are what docs/compression.md measured."""

from __future__ import annotations

from dataclasses import dataclass

from mixt_export.errors import UsageError

_LEAST = {
    "windows": 1,
    "window": 2,
    "fisher_windows": 1,
    "batch": 1,
    "term_sweeps": 0,
    "als_sweeps": 0,
    "als_steps": 1,
}


@dataclass(frozen=True)
class Settings:
    """How much is measured, and how it is regularised.

    ``windows`` calibration windows of ``window`` tokens; gradients from the first ``fisher_windows`` of them, ``batch``
    windows at a time. Dampings are multiples of the mean diagonal added to it: of the input Gram, of the Fisher matrix
    of the output, and of the Gram that the anchored objective inverts. ``rank_floor``: least share of min(m, n) that
    water-filling gives a linear. ``term_sweeps`` and ``term_ridge``: sweeps and ridge of the closed form of MixT.
    ``als_sweeps`` over the cores of a tensor train, ``als_steps`` of conjugate gradients at each.
    """

    windows: int = 64
    window: int = 256
    fisher_windows: int = 16
    batch: int = 8
    input_damping: float = 1e-4
    output_damping: float = 0.1
    anchor_damping: float = 1e-3
    rank_floor: float = 0.1
    term_sweeps: int = 8
    term_ridge: float = 1e-3
    als_sweeps: int = 4
    als_steps: int = 8

    def __post_init__(self) -> None:
        """Raise UsageError naming the first setting that makes no sense."""
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise UsageError(f"{name.replace('_', ' ')} is {getattr(self, name)}; it must be at least {least}.")
        for name in ("input_damping", "output_damping", "anchor_damping", "term_ridge"):
            if not 0.0 < getattr(self, name) < float("inf"):
                raise UsageError(f"{name.replace('_', ' ')} is {getattr(self, name)}; it must be positive.")
        if not 0.0 <= self.rank_floor <= 1.0:
            raise UsageError(f"rank floor is {self.rank_floor}; it must be between 0 and 1.")
