"""Write SVD-LLM's Hugging Face layout, as foreign.svd_llm reads it: y = u_proj(v_proj(x))."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixt_export.checkpoints.checkpoint import Checkpoint
from mixt_export.checkpoints.foreign import svd_llm as reader
from mixt_export.checkpoints.writers.foreign import class_name, write_pairs
from mixt_export.checkpoints.writers.matrices import every_two_factors
from mixt_export.progress import Progress

NAME = reader.NAME


def check(source: Checkpoint) -> None:
    """Raise UnsupportedError, naming the linear, where one is no product of two matrices."""
    every_two_factors(source, NAME)


def write(folder: Path, source: Checkpoint, progress: Progress) -> None:
    """Write ``source`` into the empty ``folder``; see foreign.write_pairs."""

    def change(ranks: Mapping[str, int]) -> dict[str, Any]:
        return {
            "model_type": f"svdllm-{source.config['model_type']}",
            "architectures": class_name(source, "SVDLLM"),
            "svd_ranks": dict(ranks),
        }

    write_pairs(folder, source, NAME, ("u_proj", "v_proj"), change, progress)
