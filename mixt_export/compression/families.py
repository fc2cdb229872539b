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
    ``ranks``: "auto" (the method's own rule), one of method.RANK_RULES or the path of a JSON file. ``objective``: see
    method.OBJECTIVES; None: the method's own. ``asvd_alpha``: power of the activations' mean size in ASVD. ``update``:
    refit the factors by least squares on the compressed model's inputs to the outputs of this objective, shift-aware or
    anchored; None: not at all. ``refine_steps``: of block refinement after the closed form; None: 0. ``store``:
    "remap8" stores most of the factors in 8 bits (remap.py) and ``keep`` then counts numbers of 16 bits; None: as they
    are. ``attended``: value projections are judged by what heads make of them (attended.py).
    """

    keep: float = 0.9
    ranks: str | Path = "auto"
    objective: str | None = None
    asvd_alpha: float = 0.5
    update: str | None = None
    refine_steps: int | None = None
    store: str | None = None
    attended: bool | None = None


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
class TuckerOptions:
    """Options of Tucker.

    ``keep``: share of the parameters that every stack without ranks of its own keeps, met within 0.5 %; the ranks are
    those with the least error. ``tucker_ranks``: (R1, R2, R3) of attention heads, or as on the command line
    ["64,4,2", "gate-up=300,600", "single=200"]. ``tucker_share``: q, k, v and o share their factors, gate and up
    theirs; False: every projection has its own. ``hooi_sweeps``, ``hooi_tolerance``: the iteration ends after so many
    sweeps, or when one gains less than this share of ||W||².
    """

    keep: float = 0.9
    tucker_ranks: Sequence[str] | Sequence[int] | str = ()
    tucker_share: bool = True
    hooi_sweeps: int = 50
    hooi_tolerance: float = 1e-7


@dataclass(frozen=True)
class TdMoeOptions:
    """Options of TD-MoE.

    ``keep``: share of the parameters that every stack of experts keeps, met within 0.5 % where ranks that are multiples
    of 8 allow it. ``whitening``: what the error is weighed by: statistics of the inputs, of the outputs (inverse),
    both, or none. ``expert_down``: decompose the downs too, not gates and ups alone.
    """

    keep: float = 0.8
    whitening: str = "input"
    expert_down: bool = False


@dataclass(frozen=True)
class LaserOptions:
    """Options of LASER.

    ``rho``: shares of the full rank that may be kept. ``search``: choose linears and shares one by one by the loss on
    the calibration texts, from the last block to the first; False: truncate every targeted linear to the one ``rho``
    given. ``search_windows``: windows that give the loss; as many others check it at the end. ``minutes``: the search
    ends at the latest then, with what it has found (the result depends on the machine only if that happens).
    """

    rho: Sequence[float] = (0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
    search: bool = True
    search_windows: int = 8
    minutes: float = 60.0


@dataclass(frozen=True)
class TTOptions:
    """Options of tensor trains.

    ``modes``: "balanced", "prime" or "8x8x9:8x12x16" (input:output), for some linears "REGEX=…"; ``cores``: of modes
    that are not given. ``tt_rank``: the largest bond, of every linear (8, "8") or of some ("q_proj=8"); ``keep``: share
    of the parameters that the others keep, outliers included; None: 0.5. ``outliers``: share of the entries, largest
    first, that are stored beside the train. ``objective``: input-agnostic or anchored (None), see method.OBJECTIVES.
    ``refine_steps``: of block refinement after the closed form, None: 0; ``controls``: as for MixT.
    """

    modes: Sequence[str] | str = ()
    cores: int = 3
    tt_rank: int | str | Sequence[str] = ()
    keep: float | None = None
    outliers: float = 0.0
    objective: str | None = None
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
    "tucker": Family(TuckerOptions, (), "all", "mixt_export.compression.tucker.job:TuckerJob"),
    "td-moe": Family(TdMoeOptions, ("output_damping",), "all", "mixt_export.compression.td_moe.job:TdMoeJob"),
    "laser": Family(LaserOptions, (), "last:4", "mixt_export.compression.laser.job:LaserJob"),
    "tt": Family(TTOptions, ("als_sweeps", "als_steps"), "last:4", "mixt_export.compression.tensor_train.job:TTJob"),
}
