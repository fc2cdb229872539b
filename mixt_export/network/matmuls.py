"""A branch as a sequence of matrix products: which axes of the activation are brought together at each step.

Each step contracts the activation with one core. The core's labels fall into three groups: L, which the activation has
and which are still needed afterwards (batch labels), K, which are summed, and N, which are new. With the activation's
other axes called M, a step is one of three products:

- ``right``: activation (…, L, M, K) · core (L, K, N), giving (…, L, M, N);
- ``left``: core (N, K) · activation (…, M₁, K, M₂), giving (…, M₁, N, M₂), which moves no axes;
- ``scale``: activation (…, M, L) × core (L), elementwise, where nothing is summed and nothing is new.

Cores are constants, so their axes may be permuted freely; what costs is permuting the activation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Literal

from mixt_export.network.ir import Branch
from mixt_export.network.order import Order, best_order

BATCH = "%batch"
"""The activation's first axis. It never moves."""

SEQ = "%seq"
"""The activation's second axis: positions of a sequence. It moves behind batch labels where a step has any."""

Axes = tuple[str, ...]

LEFT_SUFFIX = 16
"""Columns from which a left product is taken instead of two transposes and a right one.

Measured on onnxruntime's CPU GEMM, 1 to 128 tokens: at 16 columns the left product is 1.0 to 3 times as fast (tensor
trains, Kronecker sums, MixT), at 8 the right one is 1.1 to 1.4 times (Kronecker sums, MixT).
"""

_WIDTH = 64
"""Arrangements of the activation kept per step of the search."""


@dataclass(frozen=True, slots=True)
class Step:
    """One product. ``arranged`` is the order of the axes it needs, ``result`` the order it leaves."""

    core: int
    form: Literal["right", "left", "scale"]
    batch: Axes
    summed: Axes
    new: Axes
    arranged: Axes
    result: Axes


@dataclass(frozen=True, slots=True)
class Schedule:
    """Steps of a branch from the axes ``source`` to the axes ``target``; labels of size 1 are left out everywhere."""

    source: Axes
    target: Axes
    steps: tuple[Step, ...]

    @property
    def transposes(self) -> int:
        """How often the activation's axes are permuted, the last time into the order of the output modes."""
        axes, count = self.source, 0
        for step in self.steps:
            count += axes != step.arranged
            axes = step.result
        return count + (axes != self.target)


def schedule(branch: Branch, order: Order | None = None, left_from: int = LEFT_SUFFIX) -> Schedule:
    """Products for ``branch`` in ``order`` (default: the best), permuting as little of the activation as possible.

    ``left_from``: columns from which a left product replaces permuting. A dynamic programme over the arrangements of
    the activation. Raises NetworkError as ``best_order``.
    """
    chosen = best_order(branch) if order is None else order
    sizes = branch.sizes()
    source = (BATCH, SEQ, *(label for label, size in branch.in_modes if size > 1))
    target = (BATCH, SEQ, *(label for label, size in branch.out_modes if size > 1))
    uses = _last_uses(branch, chosen)
    found: dict[Axes, tuple[int, int, tuple[Step, ...]]] = {source: (0, 0, ())}
    for position, index in enumerate(chosen):
        labels = tuple(label for label, size in branch.cores[index].modes() if size > 1)
        reached: dict[Axes, tuple[int, int, tuple[Step, ...]]] = {}
        for axes, (moved, lefts, steps) in found.items():
            for step in _candidates(index, labels, axes, target, uses, position, sizes, left_from):
                cost = moved + (_elements(axes, sizes) if step.arranged != axes else 0)
                candidate = (cost, lefts + (step.form == "left"), (*steps, step))
                known = reached.get(step.result)
                if known is None or candidate[:2] < known[:2]:
                    reached[step.result] = candidate
        found = dict(sorted(reached.items(), key=lambda item: item[1][:2])[:_WIDTH])
    finished = [
        (moved + (_elements(axes, sizes) if axes != target else 0), lefts, number, steps)
        for number, (axes, (moved, lefts, steps)) in enumerate(found.items())
    ]
    return Schedule(source, target, min(finished)[-1])


def _last_uses(branch: Branch, order: Order) -> dict[str, int]:
    """Position in ``order`` after which a label is summed; output labels outlive every step."""
    uses = {label: position for position, index in enumerate(order) for label in branch.cores[index].labels}
    uses.update({label: len(order) for label, _ in branch.out_modes})
    return uses


def _candidates(
    core: int,
    labels: Axes,
    axes: Axes,
    target: Axes,
    uses: dict[str, int],
    position: int,
    sizes: dict[str, int],
    left_from: int,
) -> Iterator[Step]:
    """Ways to take ``core`` into an activation with ``axes``."""
    batch = tuple(axis for axis in axes if axis in labels and uses[axis] > position)
    summed = tuple(axis for axis in axes if axis in labels and uses[axis] == position)
    new = tuple(label for label in labels if label not in axes)
    rest = tuple(axis for axis in axes[1:] if axis not in labels)

    def for_later(label: str) -> tuple[int, int]:
        """Output labels first, in their order; then what is summed late before what is summed soon."""
        place = target.index(label) if label in target else len(target)
        return place, -uses.get(label, 0)

    if not summed and not new:
        arranged = axes if axes[len(axes) - len(batch) :] == batch else (BATCH, *rest, *batch)
        yield Step(core, "scale", batch, (), (), arranged, arranged)
        return
    late_first = tuple(sorted(new, key=for_later))
    new_orders = dict.fromkeys((late_first, late_first[::-1], new))
    rests = dict.fromkeys((rest, tuple(sorted(rest, key=for_later))))
    for fresh in new_orders:
        for kept in rests:
            arranged = (BATCH, *batch, *kept, *summed)
            yield Step(core, "right", batch, summed, fresh, arranged, (BATCH, *batch, *kept, *fresh))
        if batch or not summed:
            continue
        start = axes.index(summed[0])
        before, after = axes[:start], axes[start + len(summed) :]
        contiguous = axes[start : start + len(summed)] == summed
        if contiguous and SEQ in before and prod(sizes[label] for label in after) >= left_from:
            yield Step(core, "left", (), summed, fresh, axes, (*before, *fresh, *after))


def _elements(axes: Axes, sizes: dict[str, int]) -> int:
    return prod(sizes[label] for label in axes if label not in (BATCH, SEQ))
