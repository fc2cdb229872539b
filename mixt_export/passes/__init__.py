"""Rewritings of a checkpoint before it is lowered: exact, laid over it, one pass a file."""

from mixt_export.passes.balance import Balance, balance
from mixt_export.passes.base import Pass, PassResult, run
from mixt_export.passes.low_rank import DetectLowRank
from mixt_export.passes.turn import Turn

__all__ = ["Balance", "DetectLowRank", "Pass", "PassResult", "Turn", "balance", "run"]
