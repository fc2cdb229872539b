"""What goes into and comes out of every module of one decoder block, in PyTorch and in the exported graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from mixt_export.verification.graph import ExportedGraph
from mixt_export.verification.session import Ids
from mixt_export.verification.torch_model import TorchModel

#: Sums with the residual stream, named below the part that they end; no module does that.
_RESIDUAL = "/residual"
_ATTENTION = ("attn", "self_attn", "attention")


@dataclass(frozen=True)
class Point:
    """Where to compare: ``module`` as named inside its block, ``side`` "input" or "output"."""

    module: str
    side: str


def reference_points(model: TorchModel, layer: int, tokens: Ids) -> dict[Point, NDArray[np.float32]]:
    """Inputs and outputs (seq, features) float32 of the modules of block ``layer``, in the order of execution.

    ``tokens`` (seq,) run alone and whole. Of modules that hold others only the output; values that are no row per token
    are left out.
    """
    found: dict[Point, NDArray[np.float32]] = {}

    def keep(point: Point, values: Sequence[Any]) -> None:
        tensor = next((value for value in values if hasattr(value, "dim") and value.dim() >= 3), None)
        if tensor is not None and tensor.shape[:2] == (1, len(tokens)) and point not in found:
            found[point] = tensor.detach()[0].float().numpy().reshape(len(tokens), -1).copy()

    def before(name: str) -> Any:
        def hook(_module: Any, args: Any, kwargs: Any) -> None:
            keep(Point(name, "input"), [*args, *kwargs.values()])

        return hook

    def after(name: str) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            keep(Point(name, "output"), output if isinstance(output, tuple) else (output,))

        return hook

    handles = []
    for name, module in model.blocks[layer].named_modules():
        if not name:
            continue
        if not any(_runs(child) for child in module.children()):
            handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
        handles.append(module.register_forward_hook(after(name)))
    try:
        model.logits(tokens)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _runs(module: Any) -> bool:
    """Whether ``module`` computes something; lists of parameters do not."""
    return type(module).__name__ not in ("ParameterList", "ParameterDict")


def graph_points(graph: ExportedGraph, layer: int, points: Sequence[Point]) -> dict[Point, str]:
    """Names of the graph's values at those of ``points`` that the graph has: its nodes are named after the modules."""
    constants = {tensor.name for tensor in graph.proto.graph.initializer}
    found = {}
    for point, nodes in module_nodes(graph, layer, points).items():
        if point.side == "output":
            found[point] = nodes[-1].output[0]
            continue
        given = [name for name in nodes[0].input if name and name not in constants]
        if given:
            found[point] = given[0]
    return found


def module_nodes(graph: ExportedGraph, layer: int, points: Sequence[Point]) -> dict[Point, list[onnx.NodeProto]]:
    """The nodes of block ``layer``, in order, that do what the module of each of ``points`` does."""
    prefix = f"/model/layers.{layer}/"
    paths: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.proto.graph.node:
        if node.name.startswith(prefix) and not node.name.endswith(_RESIDUAL):
            parts = node.name[len(prefix) :].split("/")
            for depth in range(1, len(parts) + 1):
                paths.setdefault("/".join(parts[:depth]), []).append(node)
    known = {point: _path_of(point.module, list(paths)) for point in points}
    return {point: paths[path] for point, path in known.items() if path is not None}


def _path_of(module: str, paths: Sequence[str]) -> str | None:
    """The node path that means ``module``: the same last name, below a parent of the same kind."""
    *above, last = module.split(".")
    parent = above[-1] if above else ""
    attention = parent in _ATTENTION
    for path in paths:
        *holders, name = path.split("/")
        holder = holders[-1].rpartition(".")[2] if holders else ""
        if name == last and (holder == parent or (attention and holder in _ATTENTION)):
            return path
    return None
