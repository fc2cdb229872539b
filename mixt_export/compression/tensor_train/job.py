"""Make tensor trains of a dense model: TT-SVD and weighted least squares, then refinement, block after block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mixt_export.compression.families import TTOptions
from mixt_export.compression.lockstep_job import LockstepJob
from mixt_export.compression.refine import RefineSettings
from mixt_export.compression.request import Request
from mixt_export.compression.tensor_mixture.replacements import Solve
from mixt_export.compression.tensor_train.modes import Modes, capped, largest_ranks, modes_of, parameters
from mixt_export.compression.tensor_train.solver import Size, TrainSolver
from mixt_export.errors import UsageError
from mixt_export.network import FactorizedLinear
from mixt_export.selection import parse_sizes, require_matches, size_of

#: Objectives of the closed form, by what the train is compared in.
OBJECTIVES = ("input-agnostic", "anchored")
DEFAULT_KEEP = 0.5

#: Rates of refinement. The closed form leaves little to gain: at the larger rates of the default the loss of a block of
#: SmolLM2 rose from 0.063 to 0.102 in 16 steps, at these it fell from 0.128 (one sweep) to 0.112.
_MATRIX_RATE, _CORE_RATE = 1e-3, 2e-4


class TTJob(LockstepJob):
    """See the module and LockstepJob."""

    sizes: dict[str, Size]

    def __init__(self, request: Request) -> None:
        assert isinstance(request.own, TTOptions)
        self.own = request.own
        self.objective = self.own.objective or "anchored"
        if self.objective not in OBJECTIVES:
            raise UsageError(f"method tt has no objective {self.objective!r}; it has {', '.join(OBJECTIVES)}.")
        if self.own.keep is not None and not 0.0 < self.own.keep <= 1.0:
            raise UsageError(
                f"--keep {self.own.keep:g} is not a share; give a number above 0 and up to 1, such as 0.5."
            )
        if not 0.0 <= self.own.outliers < 0.5:
            raise UsageError(
                f"--outliers {self.own.outliers:g}: give the share of entries that are stored beside the train, from 0 "
                "to below 0.5, such as 1e-4."
            )
        super().__init__(request, request.own)

    @property
    def keep(self) -> float:
        """Share of the parameters that linears without a rank of their own keep."""
        return DEFAULT_KEEP if self.own.keep is None else self.own.keep

    @property
    def refinement(self) -> RefineSettings | None:
        """How blocks are refined; None: not at all, the default. Cores have four axes: they are Adam's."""
        steps = self.own.refine_steps
        return RefineSettings(steps=steps, matrix_rate=_MATRIX_RATE, learning_rate=_CORE_RATE) if steps else None

    @property
    def recipe(self) -> dict[str, Any]:
        """See Job."""
        return {
            "blocks": self.request.blocks,
            "objective": self.objective,
            "modes": list(self._modes_asked()),
            "cores": self.own.cores,
            "tt_rank": list(self._ranks_asked()),
            "keep": self.keep,
            "outliers": self.own.outliers,
            "refine_steps": self.refinement.steps if self.refinement else 0,
            "controls": self.own.controls,
        }

    @property
    def budget(self) -> int:
        """See Job."""
        return sum(self._most(name, size) for name, size in self.sizes.items())

    def check(self) -> None:
        """Raise UsageError for modes, ranks or a share that do not fit the linears."""
        names, shapes = list(self.targets), [self.shape(name) for name in self.targets]
        modes = modes_of(self._modes_asked(), names, shapes, self.own.cores)
        asked = parse_sizes(self._ranks_asked(), "--tt-rank")
        require_matches(asked, names, "--tt-rank")
        if asked[0] is not None and self.own.keep is not None:
            raise UsageError("--tt-rank gives every linear its ranks and --keep chooses them; leave one out.")
        self.sizes = {}
        for name, shape, found in zip(names, shapes, modes, strict=True):
            rank = size_of(name, asked)
            outliers = round(self.own.outliers * shape[0] * shape[1])
            ranks = None if rank is None else _checked(name, found, rank)
            self.sizes[name] = Size(found, ranks, outliers, self.dtype(name))
            least = parameters(found, [1] * (len(found[0]) - 1)) + outliers
            if ranks is None and least > self.keep * shape[0] * shape[1]:
                raise UsageError(
                    f"--keep {self.keep:g}: the smallest train of {name} with its outliers has {least} numbers, "
                    f"{least / (shape[0] * shape[1]):.4g} of the dense matrix; keep more or store fewer outliers."
                )

    def solver(self) -> tuple[Solve, Mapping[str, int]]:
        """See LockstepJob."""
        made = TrainSolver(self.sizes, self.keep, self.settings, self.objective == "anchored")
        return made, made.params

    def describe(self, linear: FactorizedLinear) -> Mapping[str, Any]:
        """See LockstepJob."""
        return {"ranks": tuple(core.tensor.shape[-1] for core in linear.branches[0].cores[:-1])}

    def _most(self, name: str, size: Size) -> int:
        if size.ranks is not None:
            return parameters(size.modes, size.ranks) + size.outliers
        out_features, in_features = self.shape(name)
        return int(self.keep * out_features * in_features)

    def _modes_asked(self) -> tuple[str, ...]:
        return (self.own.modes,) if isinstance(self.own.modes, str) else tuple(self.own.modes)

    def _ranks_asked(self) -> tuple[str, ...]:
        asked = self.own.tt_rank
        return (str(asked),) if isinstance(asked, int | str) else tuple(asked)


def _checked(name: str, modes: Modes, rank: int) -> tuple[int, ...]:
    """``rank`` at every bond of ``modes`` that can have it. Raises UsageError where none can or nothing is saved."""
    most, dense = largest_ranks(modes), 1
    for size in (*modes[0], *modes[1]):
        dense *= size
    if rank > max(most):
        raise UsageError(
            f"--tt-rank {rank}: {name} with modes {_text(modes)} has bonds of at most {max(most)}; give less, for some "
            "linears as REGEX=RANK."
        )
    ranks = capped(modes, rank)
    if parameters(modes, ranks) >= dense:
        fits = next((r for r in range(rank, 0, -1) if parameters(modes, capped(modes, r)) < dense), None)
        remedy = f"{fits} at most saves something" if fits else "choose other --modes"
        raise UsageError(
            f"--tt-rank {rank}: the train of {name} with modes {_text(modes)} would have "
            f"{parameters(modes, ranks)} numbers, the dense matrix has {dense}; {remedy}."
        )
    return ranks


def _text(modes: Modes) -> str:
    return ":".join("x".join(map(str, side)) for side in modes)
