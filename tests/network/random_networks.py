"""Random small networks for hypothesis, and their matrix by summing over every assignment of every label."""

from collections.abc import Mapping
from itertools import product

import numpy as np
from hypothesis import strategies as st

from mixt_export.network import Branch, Core, FactorizedLinear, TensorRef

LABELS = ("p", "q", "r", "s", "t", "u")


@st.composite
def linears(draw: st.DrawFn) -> FactorizedLinear:
    """One or two branches of one to four cores over up to six labels of sizes 1 to 3, with every kind of label."""
    first = draw(_branches(0))
    branches = [first]
    if draw(st.booleans()):
        second = draw(_branches(1))
        if (second.in_size, second.out_size) == (first.in_size, first.out_size):
            branches.append(second)
    bias = TensorRef("net.bias", (first.out_size,), "float64") if draw(st.booleans()) else None
    return FactorizedLinear("net", first.in_size, first.out_size, tuple(branches), bias, "random")


@st.composite
def _branches(draw: st.DrawFn, number: int) -> Branch:
    sizes = {label: draw(st.integers(1, 3)) for label in LABELS}
    subsets = st.lists(st.sampled_from(LABELS), min_size=1, max_size=4, unique=True)
    cores = draw(st.lists(subsets, min_size=1, max_size=4))
    inputs, outputs = draw(subsets), draw(subsets)
    held = {label for core in cores for label in core}
    for label in LABELS:
        ends = sum(label in core for core in cores)
        dangling = ends == 1 and label not in inputs and label not in outputs and sizes[label] > 1
        if dangling or (label in inputs and label not in held and label not in outputs):
            outputs.append(label)
        if label in outputs and label not in held and label not in inputs:
            inputs.append(label)
    refs = [
        TensorRef(f"net.{number}.{index}", tuple(sizes[x] for x in core), "float64") for index, core in enumerate(cores)
    ]
    return Branch(
        tuple((label, sizes[label]) for label in inputs),
        tuple((label, sizes[label]) for label in outputs),
        tuple(Core(ref, tuple(core)) for ref, core in zip(refs, cores, strict=True)),
        scale=draw(st.sampled_from([1.0, 0.5, -2.0])),
    )


def brute_matrix(linear: FactorizedLinear, values: Mapping[str, np.ndarray]) -> np.ndarray:
    """Sum over all assignments of all labels of the product of the cores' entries."""
    matrix = np.zeros((linear.out_features, linear.in_features))
    for branch in linear.branches:
        sizes = dict(branch.in_modes) | dict(branch.out_modes)
        for core in branch.cores:
            sizes |= dict(zip(core.labels, core.tensor.shape, strict=True))
        for point in product(*(range(size) for size in sizes.values())):
            at = dict(zip(sizes, point, strict=True))
            entry = branch.scale
            for core in branch.cores:
                entry *= values[core.tensor.name][tuple(at[label] for label in core.labels)]
            row = column = 0
            for label, size in branch.out_modes:
                row = row * size + at[label]
            for label, size in branch.in_modes:
                column = column * size + at[label]
            matrix[row, column] += entry
    return matrix
