"""A MixT linear in one of its executable forms: one node of the `mixt` domain, its weights merged at export.

The functions are graphs/ops/MixTLinear*.onnxtxt, one for each number of windows; shapes reach their bodies as
attributes, so linears of all sizes share a function. Weights are stored as the products read them: scaled, merged,
transposed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mixt_export.plan import MixtForm, Mixture, Window
from mixt_export.plan.merge import merged


def mixt_node(form: MixtForm) -> tuple[str, dict[str, list[int]]]:
    """Operator and attributes of the node that executes ``form``, which is not dense."""
    left = form.layout == "left"
    kind = "Left" if left else "Padded" if form.padded else ""
    name = f"MixTLinear{len(form.windows)}{kind}{'Bias' if form.bias else ''}"
    return name, _left(form) if left else _right(form)


def weight_names(form: MixtForm) -> list[tuple[str, Window]]:
    """The weights of ``form`` in the order of the node's inputs, named after the terms they merge."""
    return [
        (f"terms{window.first}" + (f"_{window.first + window.count - 1}" if window.count > 1 else ""), window)
        for window in form.windows
    ]


def weight_shape(form: MixtForm, window: Window) -> tuple[int, int]:
    """(in, out) for products from the right, (out, in) for products from the left."""
    return (window.rows, window.columns) if form.layout == "left" else (window.columns, window.rows)


def window_weight(
    form: MixtForm, window: Window, mixture: Mixture, load: Callable[[str], np.ndarray[Any, Any]]
) -> np.ndarray[Any, Any]:
    """The weight of ``window`` as float64 (a view), in the layout of `weight_shape`."""
    matrix = merged(mixture, window, load)
    return matrix if form.layout == "left" else matrix.T


def _right(form: MixtForm) -> dict[str, list[int]]:
    """Reshapes keep the batch (0) and fold the sequence and the leading spectators together (-1)."""
    found: dict[str, list[int]] = {}
    for number, window in enumerate(form.windows, 1):
        if form.padded:
            found[f"pads_in{number}"] = _pads(window.in_size - form.in_features)
            found[f"join{number}"] = [0, -1, window.out_size]
            found[f"pads_out{number}"] = _pads(form.out_features - window.out_size)
        if window.right > 1:
            found[f"apart_in{number}"] = [0, -1, window.columns, window.right]
            found[f"apart_out{number}"] = [0, -1, window.right, window.rows]
        found[f"columns{number}"] = [0, -1, window.columns]
    return found if form.padded else found | {"join": [0, -1, form.out_features]}


def _left(form: MixtForm) -> dict[str, list[int]]:
    """Behind the transpose of the input the tokens come last and fold together with the trailing spectators (-1)."""
    found = {f"apart_in{number}": [window.left, window.columns, -1] for number, window in enumerate(form.windows, 1)}
    ends = {"in_features": [-1, form.in_features], "join": [form.out_features, -1], "out_features": [form.out_features]}
    return found | ends


def _pads(behind: int) -> list[int]:
    """Zeros behind the features of (batch, seq, features); negative: features cut off."""
    return [0, 0, 0, 0, 0, behind]
