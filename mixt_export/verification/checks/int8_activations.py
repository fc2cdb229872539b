"""The graph as it is used, rounding activations to int8 in blocks: does it compute that, and nothing else?"""

from __future__ import annotations

import numpy as np

from mixt_export.verification.context import Context
from mixt_export.verification.gate import FLOAT32_TOLERANCE
from mixt_export.verification.graph import open_graph
from mixt_export.verification.int8_activations import rounding_activations
from mixt_export.verification.metrics import relative_l2
from mixt_export.verification.result import CheckResult
from mixt_export.verification.session import ExportedRunner
from mixt_export.verification.torch_model import TorchModel

NAME = "int8_activations"
TITLE = "Activations rounded to int8"
#: A value halfway between two codes may go either way, and what a flip moves grows on its way. How much that is for
#: this model PyTorch says itself, at float32 beside float64; the graph may be off by so many times as much.
_FACTOR = 3.0
#: Small models have so few of them that one may have some where the other has none. What rounds otherwise, or not at
#: all, is off by all that rounding costs, so this share of it tells the two apart as well.
_SHARE = 0.25


def applies(context: Context) -> bool:
    """Exports with quantised weights whose products round what they read."""
    return any(
        node.op_type == "MatMulNBits"
        for nodes in (context.graph.proto.graph.node, *(function.node for function in context.graph.proto.functions))
        for node in nodes
    )


def run(context: Context) -> CheckResult:
    """The probe at once, and its second half token by token, beside PyTorch that rounds the same way."""
    context.close()
    tokens = context.probe
    with rounding_activations(context.torch, context.matrices):
        emulated = context.torch.logits(tokens)
    wide = TorchModel(context.source, dtype="float64", threads=context.options.threads, layers=context.graph.layers)
    with rounding_activations(wide, context.matrices):
        flips = relative_l2(emulated, wide.logits(tokens))
    del wide
    runner = ExportedRunner(open_graph(context.exported), context.options.threads, all_positions=True)
    together = runner.full(tokens).logits[0]
    first = len(tokens) // 2
    sizes = [first, *[1] * (len(tokens) - first)]
    apart = np.concatenate([runner.chunks(tokens, sizes)])
    error = max(relative_l2(together, emulated), relative_l2(apart, emulated[np.cumsum(sizes) - 1]))
    cost = relative_l2(emulated, context.probe_reference[0])
    bar = max(FLOAT32_TOLERANCE, _FACTOR * flips, _SHARE * cost)
    reason = (
        "" if error <= bar else f"relative L2 of logits {error:.1e} from PyTorch that rounds alike exceeds {bar:.1e}"
    )
    metrics = {"rel_l2": error, "bar": bar, "rounding_costs": cost}
    return CheckResult(NAME, TITLE, not reason, reason, metrics=dict(metrics))
