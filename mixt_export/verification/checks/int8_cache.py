"""Keys and values at 8 bits: does the graph keep them so, and do the scales fit what the model computes?"""

from __future__ import annotations

from mixt_export.verification.alike import beside
from mixt_export.verification.context import Context
from mixt_export.verification.int8_cache import Fit, cache_scales, rounding_cache
from mixt_export.verification.quantised import float_activations
from mixt_export.verification.result import CheckResult

NAME = "int8_cache"
TITLE = "Keys and values at int8"
#: Of the keys or the values of a block, on text: the share that may lie beyond the range of their scales, and the
#: relative L2 that rounding may cost. In SmolLM2 it is 0.01 % and 1.6 %, in models of random weights up to 4 % and 7 %.
_CLIPPED, _ERROR = 0.1, 0.15


def applies(context: Context) -> bool:
    """Exports with such a cache."""
    return context.graph.int8_cache


def run(context: Context) -> CheckResult:
    """The graph with float activations and its own cache beside PyTorch that keeps keys and values as it does."""
    scales, fit = cache_scales(context.graph), Fit()
    graph = float_activations(context.graph) if context.matrices else context.graph
    reason, metrics = beside(context, graph, lambda model, _sizes: rounding_cache(model, scales, fit))
    metrics |= {"clipped": max(fit.clipped.values()), "cache_rel_l2": max(fit.error.values())}
    where = ""
    for found, most, what in (
        (fit.clipped, _CLIPPED, "lie beyond the range of their scales"),
        (fit.error, _ERROR, "are lost by rounding them"),
    ):
        layer, part = max(found, key=found.__getitem__)
        if not reason and found[layer, part] > most:
            where = f"model.layers.{layer}"
            reason = f"{where}: {found[layer, part]:.1%} of its {part}s {what}, at most {most:.0%} may"
    return CheckResult(NAME, TITLE, not reason, reason, where, dict(metrics))
