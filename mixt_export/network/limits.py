"""Bounds on what a description may claim, so that a hostile or broken file fails early and cheaply."""

from __future__ import annotations

MAX_FEATURES = 2**31
"""Features of one side of a linear, and the product of the modes of one side."""

MAX_PADDING = 64
"""How many times the product of a padded branch's modes may exceed the features."""

MAX_AXES = 16
"""Axes of one core."""

MAX_LABELS = 50
"""Labels of one branch: with the two that stand for batch axes, einsum's alphabet of 52 letters."""

MAX_CORES = 64
"""Cores of one branch."""

MAX_BRANCHES = 64
"""Branches of one linear."""

MAX_STATE = 2**28
"""Elements per token of the largest intermediate of a contraction."""
