"""What a compression method is, and the registries. Imports nothing heavy: the command line lists them."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

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

RANK_RULES = ("uniform", "water-filling")

#: Method name -> module that holds its METHOD.
METHODS = {
    "gfw-svd": "mixt_export.compression.methods.gfw_svd",
    "svd-llm": "mixt_export.compression.methods.svd_llm",
    "aa-svd": "mixt_export.compression.methods.aa_svd",
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
    """``fisher``: outputs are weighed by the Fisher matrix of the loss, else by the identity."""

    objective: str
    objectives: tuple[str, ...]
    fisher: bool
    ranks: str


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
