"""How many directions each linear keeps: one rule a file. numpy only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mixt_export.compression.allocation.candidates import TOLERANCE, Candidate, Ranks, kept_parameters
from mixt_export.compression.allocation.given import from_file
from mixt_export.compression.allocation.svd_llm_v2 import svd_llm_v2
from mixt_export.compression.allocation.uniform import uniform
from mixt_export.compression.allocation.water_filling import water_filling

#: What a rule may weigh, as ``Candidate.loss``:
#: ``nothing``: it looks at shapes alone; ``error``: squared output error over all calibration tokens;
#: ``relative``: output error over the output's energy; ``loss``: estimated increase of the loss in nats per token.
WEIGHED = ("nothing", "error", "relative", "loss")


@dataclass(frozen=True)
class Rule:
    """An allocation rule. ``choose(candidates, keep, floor)``: see water_filling; ``weighs``: one of WEIGHED."""

    summary: str
    weighs: str
    choose: Callable[[Sequence[Candidate], float, float], Ranks]


#: Values of --ranks beside the path of a JSON file (method.RANK_RULES lists the names for the command line).
ALLOCATIONS = {
    "uniform": Rule("the same share in every linear", "nothing", uniform),
    "water-filling": Rule("least estimated increase of the loss", "loss", water_filling),
    "relative": Rule("least sum of relative output errors; needs no gradients", "relative", water_filling),
    "svd-llm-v2": Rule("by 1 / log of the output error, within each matrix type", "error", svd_llm_v2),
}

__all__ = [
    "ALLOCATIONS",
    "TOLERANCE",
    "WEIGHED",
    "Candidate",
    "Ranks",
    "Rule",
    "from_file",
    "kept_parameters",
    "svd_llm_v2",
    "uniform",
    "water_filling",
]
