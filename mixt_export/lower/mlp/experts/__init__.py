"""Mixture of experts: routing, factors that all experts share, and two ways of running the chosen experts."""

from mixt_export.lower.mlp.experts.kinds import run_as_stored
from mixt_export.lower.mlp.experts.moe import lower_moe

__all__ = ["lower_moe", "run_as_stored"]
