"""What the graph states outright: norms' epsilon, attention's scale and window, the kind of GELU, beside PyTorch.

A wrong epsilon may change activations by less than rounding does on the texts at hand, and by much more on others; the
two kinds of GELU differ by less than float16 rounds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import onnx

from mixt_export.verification.context import Context
from mixt_export.verification.locate import AFTER
from mixt_export.verification.result import CheckResult
from mixt_export.verification.trace import Point, module_nodes

NAME = "declared"
TITLE = "Stated numbers"
_EPSILON = ("variance_epsilon", "eps", "epsilon")
_ATTENTIONS = frozenset({"Attention", "GroupQueryAttention"})
#: Where GELU is asked for its value: by the error function 1.954500, by tanh 1.954598.
_PROBE = 2.0
#: float32 rounds what Python holds in float64.
_SAME = 1e-6

Number = float | int
Stated = tuple[str, str, str, Number, Number]


def run(context: Context) -> CheckResult:
    """Compare every number that both state."""
    stated = list(_stated(context))
    wrong = [entry for entry in stated if not math.isclose(entry[3], entry[4], rel_tol=_SAME)]
    reason, where, part = "", "", ""
    if wrong:
        where, part, what, said, true = wrong[0]
        reason = f"{what} is {said:g} in the graph and {true:g} in PyTorch"
        reason += f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    return CheckResult(NAME, TITLE, not reason, reason, where, {"numbers": len(stated), "wrong": len(wrong)}, part=part)


def _stated(context: Context) -> Iterator[Stated]:
    """Block, module in it, what, the graph's number, PyTorch's."""
    norm = context.torch.final_norm
    if norm is not None:
        prefix = f"/model/{norm[0].rpartition('.')[2]}/"
        own = [node for node in context.graph.proto.graph.node if node.name.startswith(prefix)]
        yield from _epsilons(own, norm[1], AFTER, norm[0])
    for layer, block in enumerate(context.torch.blocks):
        where = f"model.layers.{layer}"
        modules = {name: module for name, module in block.named_modules() if name}
        nodes = module_nodes(context.graph, layer, [Point(name, "output") for name in modules])
        for name, own in nodes.items():
            yield from _epsilons(own, modules[name.module], where, name.module)
        attention = next((m for m in modules.values() if isinstance(getattr(m, "scaling", None), float)), None)
        yield from _attention(context, layer, attention, where) if attention is not None else ()
        yield from _gelu(context, layer, modules.values(), where)


def _epsilons(nodes: list[onnx.NodeProto], module: Any, where: str, part: str) -> Iterator[Stated]:
    given = (getattr(module, name, None) for name in _EPSILON)
    true = next((value for value in given if isinstance(value, float)), None)
    for node in nodes:
        said = _attributes(node).get("epsilon")
        if said is not None and true is not None:
            yield where, part, "epsilon", said, true


def _attention(context: Context, layer: int, module: Any, where: str) -> Iterator[Stated]:
    prefix = f"/model/layers.{layer}/"
    for node in context.graph.proto.graph.node:
        if node.op_type not in _ATTENTIONS or not node.name.startswith(prefix):
            continue
        attributes = _attributes(node)
        if attributes.get("scale"):
            yield where, "attention", "the scale of attention", attributes["scale"], module.scaling
        window = getattr(module, "sliding_window", None)
        if isinstance(window, int) and node.op_type == "GroupQueryAttention":
            yield where, "attention", "the window of attention", attributes.get("local_window_size", -1), window


def _gelu(context: Context, layer: int, modules: Iterable[Any], where: str) -> Iterator[Stated]:
    import torch

    true = next((m for m in modules if "gelu" in type(m).__name__.lower() and not list(m.parameters())), None)
    for node in context.graph.proto.graph.node:
        if true is None or node.op_type != "Gelu" or not node.name.startswith(f"/model/layers.{layer}/"):
            continue
        kind = next((entry.s.decode() for entry in node.attribute if entry.name == "approximate"), "none")
        said = torch.nn.functional.gelu(torch.tensor(_PROBE), approximate=kind)
        yield where, "mlp", f"GELU of {_PROBE:g}", float(said), float(true(torch.tensor(_PROBE)))


def _attributes(node: onnx.NodeProto) -> dict[str, Number]:
    """Attributes that are one number."""
    return {entry.name: entry.f if entry.type == onnx.AttributeProto.FLOAT else entry.i for entry in node.attribute}
