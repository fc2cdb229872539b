"""In which order a branch's cores meet the input, and what that costs.

Contraction is activation-first: every step contracts the running activation with one core, so that two constants are
never multiplied together and a factorised linear never grows back into a dense one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod

from mixt_export.errors import NetworkError
from mixt_export.network import limits
from mixt_export.network.ir import Branch, FactorizedLinear

Order = tuple[int, ...]
"""Indices of a branch's cores in the order in which they meet the activation."""

_WIDTH = 1024
"""Subsets of cores kept per step of the search: at least the 924 of 6 out of 12, so exact up to 12 cores."""


def best_order(branch: Branch) -> Order:
    """Order with the fewest multiply-adds per token; exact up to 12 cores, a beam search beyond.

    Ties go to the smaller largest intermediate, then to the order of the cores in the branch. Raises NetworkError
    when even that order needs an intermediate of more than ``limits.MAX_STATE`` elements per token.
    """
    sizes = branch.sizes()
    number = {label: index for index, label in enumerate(sizes)}
    order, peak = _search(
        tuple(number[label] for label, _ in branch.in_modes),
        tuple(number[label] for label, _ in branch.out_modes),
        tuple(tuple(number[label] for label in core.labels) for core in branch.cores),
        tuple(sizes.values()),
    )
    if peak > limits.MAX_STATE:
        raise NetworkError(
            f"Branch with cores {', '.join(repr(core.tensor.name) for core in branch.cores)}: expected a contraction "
            f"with at most {limits.MAX_STATE} elements per token in flight, the best order needs {peak}."
        )
    return order


def best_orders(linear: FactorizedLinear) -> tuple[Order, ...]:
    """The best order of every branch. Raises NetworkError as ``best_order``, naming the linear."""
    try:
        return tuple(best_order(branch) for branch in linear.branches)
    except NetworkError as error:
        raise NetworkError(f"Linear {linear.name!r}: {error}") from error


def macs(linear: FactorizedLinear, orders: Sequence[Order] | None = None) -> int:
    """Multiply-adds per token of ``linear``: all branches in their padded size, and the sparse residual.

    ``orders`` holds one order per branch; without it each branch takes its best. Adding branches and bias is not
    counted. Raises NetworkError when an order is not a permutation of its branch's cores, and as ``best_order``.
    """
    if orders is not None and len(orders) != len(linear.branches):
        raise NetworkError(
            f"Linear {linear.name!r}: expected one order per branch ({len(linear.branches)}), found {len(orders)}."
        )
    chosen = best_orders(linear) if orders is None else orders
    total = 0 if linear.sparse is None else linear.sparse.nnz
    for branch, order in zip(linear.branches, chosen, strict=True):
        if sorted(order) != list(range(len(branch.cores))):
            raise NetworkError(
                f"Linear {linear.name!r}: expected a permutation of the {len(branch.cores)} cores of a branch, "
                f"found {tuple(order)}."
            )
        total += sum(cost for cost, _ in steps(branch, order))
    return total


def steps(branch: Branch, order: Order) -> list[tuple[int, tuple[str, ...]]]:
    """For each step of ``order``: multiply-adds per token, and the activation's labels afterwards.

    A label stays while the output or a core still to come needs it. Kept labels come first in their old order, then
    those that the core brings, in the core's order.
    """
    sizes = branch.sizes()
    state = tuple(label for label, _ in branch.in_modes)
    done = []
    for position, index in enumerate(order):
        core = branch.cores[index].labels
        needed = {label for label, _ in branch.out_modes}
        needed.update(label for later in order[position + 1 :] for label in branch.cores[later].labels)
        joint = state + tuple(label for label in core if label not in state)
        cost = prod(sizes[label] for label in joint)
        state = tuple(label for label in joint if label in needed)
        done.append((cost, state))
    return done


@lru_cache(maxsize=4096)
def _search(
    inputs: tuple[int, ...], outputs: tuple[int, ...], cores: tuple[tuple[int, ...], ...], sizes: tuple[int, ...]
) -> tuple[Order, int]:
    """Dynamic programme over the sets of cores already met. Returns the order and its largest intermediate.

    What the activation looks like depends on the set alone, so the cheapest way to reach each set is enough. Labels
    and sets are bit masks. Nothing is followed that already costs more than the cores in their own order, or reversed.
    """
    masks = [_mask(core) for core in cores]
    source, target = _mask(inputs), _mask(outputs)
    forwards = tuple(range(len(cores)))
    bound, simple = min((_cost(order, source, target, masks, sizes), order) for order in (forwards, forwards[::-1]))
    layer: dict[int, tuple[int, int, Order]] = {0: (0, _size(source, sizes), ())}
    for _ in cores:
        reached: dict[int, tuple[int, int, Order]] = {}
        for met, (cost, peak, order) in layer.items():
            state = _state(met, source, target, masks)
            for index, mask in enumerate(masks):
                if met >> index & 1:
                    continue
                total = cost + _size(state | mask, sizes)
                if total > bound:
                    continue
                after = met | 1 << index
                left = _size(_state(after, source, target, masks), sizes)
                candidate = (total, max(peak, left), (*order, index))
                if after not in reached or candidate < reached[after]:
                    reached[after] = candidate
        layer = dict(sorted(reached.items(), key=lambda item: item[1])[:_WIDTH])
    if not layer:  # beyond 12 cores the beam may lose every way to stay below the bound
        sets = [sum(1 << index for index in simple[:count]) for count in range(len(cores) + 1)]
        return simple, max(_size(_state(some, source, target, masks), sizes) for some in sets)
    _, peak, order = layer[(1 << len(cores)) - 1]
    return order, peak


def _cost(order: Order, source: int, target: int, masks: list[int], sizes: tuple[int, ...]) -> int:
    """Multiply-adds per token of one order."""
    met = total = 0
    for index in order:
        total += _size(_state(met, source, target, masks) | masks[index], sizes)
        met |= 1 << index
    return total


def _mask(labels: tuple[int, ...]) -> int:
    return sum(1 << label for label in labels)


def _state(met: int, inputs: int, outputs: int, cores: list[int]) -> int:
    """Labels the activation has after the cores of ``met``: seen so far and still needed."""
    seen, needed = inputs, outputs
    for index, core in enumerate(cores):
        if met >> index & 1:
            seen |= core
        else:
            needed |= core
    return seen & needed


def _size(mask: int, sizes: tuple[int, ...]) -> int:
    return prod(size for label, size in enumerate(sizes) if mask >> label & 1)
