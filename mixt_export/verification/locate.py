"""Name the fault: the first block whose output departs from PyTorch's, and in it the first linear or norm.

Every candidate is judged by how much the error grows from one place to the next, not by its size alone: what is
wrong early is wrong everywhere after.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixt_export.verification.context import Context
from mixt_export.verification.graph import LAST_POSITION
from mixt_export.verification.layers import LayerErrors, suspect
from mixt_export.verification.metrics import token_relative_l2
from mixt_export.verification.quantised import smoothed_values
from mixt_export.verification.routes import Route
from mixt_export.verification.session import RunFailed
from mixt_export.verification.trace import Point, graph_points, reference_points

#: Where a fault sits that no block shows.
AFTER = "final norm, last position or output projection"
EMBEDDINGS = "embeddings"


@dataclass(frozen=True)
class Finding:
    """``where``: block as ``model.layers.7``, EMBEDDINGS or AFTER; ``part``: what in it, empty where unknown."""

    where: str = ""
    part: str = ""


def locate(context: Context, route: Route) -> Finding:
    """Run ``route`` through the instrumented graph and name what departs first; nothing when it cannot be run."""
    with context.emulating(route.emulated), context.torch.behind(route.past):
        return _located(context, route)


def _located(context: Context, route: Route) -> Finding:
    errors = LayerErrors(context.graph.layers)
    try:
        outputs = route.values(context.instrumented())
    except RunFailed:
        return Finding()
    for tokens, layers in zip(route.sequences, outputs, strict=True):
        errors.add(layers, context.torch.hidden(tokens)[1])
    return _within(context, route, errors.first_beyond(context.gate.layers, context.gate.floor))


def _within(context: Context, route: Route, layer: int | None) -> Finding:
    """The part of block ``layer`` (None: after the last) that departs first on ``route``."""
    try:
        if layer is None:
            return Finding(AFTER, _after(context, route))
        part = _inside(context, route, layer)
    except RunFailed:
        return Finding(AFTER if layer is None else f"model.layers.{layer}")
    if part == EMBEDDINGS:
        return Finding(EMBEDDINGS)
    return Finding(f"model.layers.{layer}", part)


def _inside(context: Context, route: Route, layer: int) -> str:
    sequences = route.sequences
    expected = [reference_points(context.torch, layer, tokens) for tokens in sequences]
    places = graph_points(context.graph, layer, list(expected[0]))
    names = list(dict.fromkeys(places.values()))
    if not names:
        return ""
    found = route.values(context.observed(names))
    factors = smoothed_values(context.graph, context.matrices)
    errors: dict[Point, float] = {}
    for point, name in places.items():
        pairs = [(values[names.index(name)], known[point]) for values, known in zip(found, expected, strict=True)]
        if name in factors:
            pairs = [(ours * factors[name], theirs) for ours, theirs in pairs]
        shaped = [(_rows(ours), theirs) for ours, theirs in pairs]
        if all(ours is not None and ours.shape == theirs.shape for ours, theirs in shaped):
            errors[point] = max(token_relative_l2(ours, theirs) for ours, theirs in shaped if ours is not None)
    points = list(errors)
    index = suspect([errors[point] for point in points], [context.gate.layers[layer]] * len(points), context.gate.floor)
    return _described(points, index, layer)


def _described(points: Sequence[Point], index: int | None, layer: int) -> str:
    """The first departing point in words."""
    if not points:
        return ""
    if index is None:
        return f"after {points[-1].module}"
    point = points[index]
    if point.side == "output":
        return point.module
    if index == 0:
        return EMBEDDINGS if layer == 0 else f"before {point.module}"
    holder, _, last = point.module.rpartition(".")
    return f"{holder}, before its {last}" if holder else f"before {point.module}"


def _after(context: Context, route: Route) -> str:
    """Which of final norm, output projection and choice of the position departs."""
    picker = next(node for node in context.graph.proto.graph.node if node.name == LAST_POSITION)
    tokens = route.sequences[0]
    bar = context.gate.tolerance
    normed: list[NDArray[np.float32]] = []
    norm = context.torch.final_norm
    if norm is not None:
        handle = norm[1].register_forward_hook(
            lambda _module, _args, output: normed.append(output.detach()[0].float().numpy().copy())
        )
        try:
            expected = context.torch.logits(tokens)
        finally:
            handle.remove()
    else:
        expected = context.torch.logits(tokens)
    runner = context.observed([picker.input[0]])
    cache = runner.given(route.past) if route.past else None
    width = len(tokens) + (route.past[0].shape[2] if route.past else 0)
    step = runner.run(tokens[None, :], np.ones((1, width), np.int64), cache)
    ours = _rows(step.layers[0][0])
    if norm is not None and ours is not None and normed and ours.shape == normed[0].shape:
        error = token_relative_l2(ours, normed[0])
        if not error <= bar:
            return str(norm[0])
    error = token_relative_l2(step.logits[0], expected)
    return "lm_head" if not error <= bar or not math.isfinite(error) else "last position"


def _rows(value: NDArray[np.floating]) -> NDArray[np.float32] | None:
    """(seq, …) -> (seq, features) float32; None where the value is no row per token."""
    return value.astype(np.float32).reshape(len(value), -1) if value.ndim >= 2 else None
