"""Write ABLinear (LowRankArena), as foreign.ablinear reads it: y = ALinear(BLinear(x))."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixt_export.checkpoints.checkpoint import Checkpoint
from mixt_export.checkpoints.foreign import ablinear as reader
from mixt_export.checkpoints.writers.foreign import class_name, write_pairs
from mixt_export.checkpoints.writers.matrices import every_two_factors
from mixt_export.progress import Progress

NAME = reader.NAME


def check(source: Checkpoint) -> None:
    """Raise UnsupportedError, naming the linear, where one is no product of two matrices."""
    every_two_factors(source, NAME)


def write(folder: Path, source: Checkpoint, progress: Progress) -> None:
    """Write ``source`` into the empty ``folder``; see foreign.write_pairs."""
    methods = {linear.method for linear in source.factors.values()}

    def change(ranks: Mapping[str, int]) -> dict[str, Any]:
        return {
            "model_type": f"lowrank_{source.config['model_type']}",
            "architectures": class_name(source, "LowRank"),
            "low_rank_modules": {linear: {"rank": rank} for linear, rank in ranks.items()},
            "low_rank_method": methods.pop() if len(methods) == 1 else "mixed",
            "low_rank_schema": reader.SCHEMA,
            "low_rank_format_version": reader.VERSION,
        }

    write_pairs(folder, source, NAME, ("ALinear", "BLinear"), change, progress)
