"""Families of methods: which options each understands and what runs it. Imports nothing heavy."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixt_export.compression.job import Job


@dataclass(frozen=True)
class LowRankOptions:
    """Options of the low rank methods.

    ``keep``: parameters kept in the targeted linears (factors, plus those that stay dense) over their dense parameters.
    ``ranks``: "auto" (the method's own rule), "uniform", "water-filling" or the path of a JSON file. ``objective``: see
    method.OBJECTIVES; None: the method's own.
    """

    keep: float = 0.9
    ranks: str | Path = "auto"
    objective: str | None = None


@dataclass(frozen=True)
class MixTOptions:
    """Options of MixT.

    ``n_tensors``: N_T of every linear, or of those whose path a regular expression is found in: 4, {"q_proj": 2} (the
    others keep the default), or as on the command line ["4", "q_proj=2"]. ``bond``: the local dimension d.
    ``paper_padding``: features are padded to powers of d as the paper publishes it, instead of the exact form.
    ``permute``: reorder the hidden channels of every MLP that is replaced whole, which is free (see permutation.py).
    ``refine_steps``: steps of block refinement after the closed form, 0 for none; None: the default of the refinement.
    ``controls``: measure the result and its controls on held-out texts.
    """

    n_tensors: int | Mapping[str, int] | Sequence[str] = 4
    bond: int = 2
    paper_padding: bool = False
    permute: bool = True
    refine_steps: int | None = None
    controls: bool = True


@dataclass(frozen=True)
class Family:
    """``options``: dataclass of what only this family understands; ``settings``: fields of Settings that only it reads.

    ``blocks``: which blocks are compressed by default; ``job``: "module:class" of the Job that runs it.
    """

    options: type[Any]
    settings: tuple[str, ...]
    blocks: str
    job: str

    @property
    def option_names(self) -> tuple[str, ...]:
        """Names of the options."""
        return tuple(field.name for field in fields(self.options))

    def load_job(self) -> type[Job]:
        """The class that runs the family; imports torch."""
        module, _, name = self.job.partition(":")
        job: type[Job] = getattr(importlib.import_module(module), name)
        return job


FAMILIES = {
    "low rank": Family(
        LowRankOptions,
        ("fisher_windows", "output_damping", "rank_floor"),
        "all",
        "mixt_export.compression.low_rank:LowRankJob",
    ),
    "mixt": Family(
        MixTOptions,
        ("term_ridge", "term_sweeps"),
        "last:4",
        "mixt_export.compression.tensor_mixture.job:MixTJob",
    ),
}
