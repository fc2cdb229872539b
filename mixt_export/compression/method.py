"""What a compression method is, and the registries. Imports nothing heavy: the command line lists them."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from mixt_export.compression.families import LowRankOptions
from mixt_export.errors import UnsupportedError, UsageError

#: Objective -> (A, B) of min ||W A - W' B||: inputs in the dense (X) and in the compressed model (X').
OBJECTIVES = {
    "input-agnostic": "||W - W'||: no calibration enters the factors",
    "input-aware": "||W X - W' X||: inputs of the dense model",
    "shift-aware": "||W X' - W' X'||: inputs of the partly compressed model",
    "anchored": "||W X - W' X'||: dense outputs from the partly compressed model's inputs",
}
#: Objectives that need the compressed model's activations, hence block-after-block processing.
SEQUENTIAL = ("shift-aware", "anchored")

#: Metric of a linear's input -> what its square root R is, S = R Rᵀ (closed_form.ROOTS computes it).
INPUT_METRICS = {
    "identity": "no calibration: S = I",
    "diagonal": "activation-aware: S = diag(mean|x_j|^alpha)²",
    "cholesky": "S = mean x xᵀ, its Cholesky factor",
    "eigen": "S = mean x xᵀ, the square root of its eigendecomposition",
}
#: Metric of a linear's output -> what it is.
OUTPUT_METRICS = {
    "identity": "every output counts alike",
    "fisher": "mean g gᵀ of the loss gradient g at the output",
}

#: Rules that choose ranks, see allocation.ALLOCATIONS.
RANK_RULES = ("uniform", "water-filling", "relative", "svd-llm-v2")

#: Method name -> module that holds its METHOD.
METHODS = {
    "gfw-svd": "mixt_export.compression.methods.gfw_svd",
    "svd-llm": "mixt_export.compression.methods.svd_llm",
    "svd-llm-v2": "mixt_export.compression.methods.svd_llm_v2",
    "aa-svd": "mixt_export.compression.methods.aa_svd",
    "asvd": "mixt_export.compression.methods.asvd",
    "svd": "mixt_export.compression.methods.svd",
    "mixt": "mixt_export.compression.methods.mixt",
    "tt": "mixt_export.compression.methods.tt",
    "tucker": "mixt_export.compression.methods.tucker",
    "td-moe": "mixt_export.compression.methods.td_moe",
    "laser": "mixt_export.compression.methods.laser",
}
DEFAULT_METHOD = "gfw-svd"


@dataclass(frozen=True)
class Method:
    """A method as data. ``family`` says how it runs, see families.FAMILIES."""

    name: str
    summary: str
    family: str


@dataclass(frozen=True)
class LowRankMethod(Method):
    """``input_metric``, ``output_metric``: see INPUT_METRICS and OUTPUT_METRICS; the former holds for every objective
    but input-agnostic, which is the identity. ``ranks``: the name of the rule that chooses ranks.
    """

    objective: str
    objectives: tuple[str, ...]
    input_metric: str
    output_metric: str
    ranks: str

    @property
    def fisher(self) -> bool:
        """Whether outputs are weighed by the Fisher matrix of the loss."""
        return self.output_metric == "fisher"


def get_method(name: str) -> Method:
    """The method called ``name``; UnsupportedError naming the known ones otherwise."""
    if name not in METHODS:
        raise UnsupportedError(f"method {name!r} is unknown; choose one of {', '.join(METHODS)}.")
    method: Method = importlib.import_module(METHODS[name]).METHOD
    return method


def choose_objective(method: LowRankMethod, objective: str | None) -> str:
    """``objective``, or the method's own when None. UsageError when the method has no such objective."""
    if objective is None:
        return method.objective
    if objective not in method.objectives:
        raise UsageError(f"method {method.name} has no objective {objective!r}; it has {', '.join(method.objectives)}.")
    return objective


def check_adjustments(method: LowRankMethod, objective: str, own: LowRankOptions) -> None:
    """Raise UsageError where an option that adjusts the closed form makes no sense with ``method`` or ``objective``."""
    if own.asvd_alpha != LowRankOptions.asvd_alpha and method.input_metric != "diagonal":
        raise UsageError(f"--asvd-alpha does not apply to method {method.name}; give --method asvd with it.")
    if not 0.0 <= own.asvd_alpha <= 4.0:
        raise UsageError(f"--asvd-alpha {own.asvd_alpha:g}: give a power from 0 (plain SVD) to 4, such as 0.5.")
    if own.refine_steps is not None and own.refine_steps < 0:
        raise UsageError(f"--refine-steps {own.refine_steps}: give 0 for none, or how many.")
    if own.attended and (own.update is not None or objective != "input-aware"):
        raise UsageError(
            "--attended: value projections behind the attention are measured in the dense model alone; use it with "
            "objective input-aware and without --update."
        )
    if own.update is None:
        return
    if own.update not in SEQUENTIAL:
        raise UsageError(f"--update {own.update!r} is unknown; it fits outputs {' or '.join(SEQUENTIAL)}.")
    if objective in SEQUENTIAL:
        raise UsageError(
            f"--update: objective {objective} gives the best factors on the compressed model's inputs already; use "
            "--update with objective input-aware."
        )
