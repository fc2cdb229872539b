"""Any network, not only the known ones: brute force, densify and apply agree; the order found is the cheapest."""

from itertools import permutations
from math import prod

import numpy as np
from hypothesis import given, settings

from mixt_export.network import Branch, FactorizedLinear, apply, best_order, densify, from_json, macs, to_json
from tests.network.cases import random_values
from tests.network.random_networks import brute_matrix, linears


@settings(max_examples=150, deadline=None)
@given(linears())
def test_densify_and_apply_are_brute_force(linear: FactorizedLinear) -> None:
    values = random_values(linear, seed=1)
    expected = brute_matrix(linear, values)
    scale = 1.0 + np.abs(expected).max()
    assert np.abs(densify(linear, values.__getitem__) - expected).max() <= 1e-12 * scale
    x = np.random.default_rng(2).standard_normal((2, 3, linear.in_features))
    y = x @ expected.T + (0.0 if linear.bias is None else values["net.bias"])
    assert np.abs(apply(linear, values.__getitem__, x) - y).max() <= 1e-11 * scale


def cost(branch: Branch, order: tuple[int, ...]) -> int:
    """Multiply-adds per token: at each step, every combination of the labels held or brought."""
    sizes = dict(branch.in_modes) | dict(branch.out_modes)
    for core in branch.cores:
        sizes |= dict(zip(core.labels, core.tensor.shape, strict=True))
    total, held = 0, {label for label, _ in branch.in_modes}
    for position, index in enumerate(order):
        held |= set(branch.cores[index].labels)
        total += prod(sizes[label] for label in held)
        later = {label for rest in order[position + 1 :] for label in branch.cores[rest].labels}
        held &= later | {label for label, _ in branch.out_modes}
    return total


@settings(max_examples=100, deadline=None)
@given(linears())
def test_order_is_the_cheapest_of_all(linear: FactorizedLinear) -> None:
    for branch in linear.branches:
        costs = {order: cost(branch, order) for order in permutations(range(len(branch.cores)))}
        assert costs[best_order(branch)] == min(costs.values())
        single = FactorizedLinear("b", branch.in_size, branch.out_size, (branch,))
        for order, expected in costs.items():
            assert macs(single, [order]) == expected


@settings(max_examples=50, deadline=None)
@given(linears())
def test_json_round_trip(linear: FactorizedLinear) -> None:
    tensors = {tensor.name: tensor for tensor in linear.tensors()}
    assert from_json("net", to_json(linear), tensors) == linear
