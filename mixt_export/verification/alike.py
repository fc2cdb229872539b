"""A graph that rounds on its way, beside PyTorch that rounds alike: how far apart they may be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import numpy as np
from numpy.typing import NDArray

from mixt_export.verification.context import Context
from mixt_export.verification.gate import FLOAT32_TOLERANCE
from mixt_export.verification.graph import ExportedGraph
from mixt_export.verification.metrics import relative_l2
from mixt_export.verification.session import ExportedRunner
from mixt_export.verification.torch_model import TorchModel

#: A value halfway between two codes may go either way, and what a flip moves grows on its way. How much that is for
#: this model PyTorch says itself, at float32 beside float64; the graph may be off by so many times as much.
_FACTOR = 3.0
#: Small models have so few of them that one may have some where the other has none. What rounds otherwise, or not at
#: all, is off by all that rounding costs, so this share of it tells the two apart as well.
_SHARE = 0.25


def beside(
    context: Context,
    graph: ExportedGraph,
    rounding: Callable[[TorchModel, Sequence[int]], AbstractContextManager[None]],
) -> tuple[str, dict[str, float]]:
    """The probe through ``graph`` at once, and its second half token by token, beside PyTorch inside of ``rounding``.

    ``rounding`` is told how many tokens each call of the graph is given: what is rounded together may depend on that.
    Returns why that fails, or an empty string, and the figures.
    """
    context.close()
    tokens = context.probe
    first = len(tokens) // 2
    calls = [len(tokens)], [first, *[1] * (len(tokens) - first)]

    def emulated_by(model: TorchModel) -> list[NDArray[np.float32]]:
        found = []
        for sizes in calls:
            with rounding(model, sizes):
                found.append(model.logits(tokens))
        return found

    emulated = emulated_by(context.torch)
    wide = TorchModel(context.source, dtype="float64", threads=context.options.threads, layers=context.graph.layers)
    flips = max(map(relative_l2, emulated, emulated_by(wide)))
    del wide
    runner = ExportedRunner(graph, context.options.threads, all_positions=True)
    together = runner.full(tokens).logits[0]
    apart = np.concatenate([runner.chunks(tokens, calls[1])])
    error = max(relative_l2(together, emulated[0]), relative_l2(apart, emulated[1][np.cumsum(calls[1]) - 1]))
    cost = max(relative_l2(logits, context.probe_reference[0]) for logits in emulated)
    bar = max(FLOAT32_TOLERANCE, _FACTOR * flips, _SHARE * cost)
    reason = (
        "" if error <= bar else f"relative L2 of logits {error:.1e} from PyTorch that rounds alike exceeds {bar:.1e}"
    )
    return reason, {"rel_l2": error, "bar": bar, "rounding_costs": cost}
