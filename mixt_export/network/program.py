"""A branch as a list of instructions: what is reshaped, permuted and multiplied, with every shape.

One walk decides it, for whoever writes a graph and for whoever predicts what the graph will cost. A core is read as a
matrix (or a stack of them) whose axes hold groups of its labels; cores are constants, so they can be stored that way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Literal

from mixt_export.network.ir import Branch
from mixt_export.network.matmuls import BATCH, LEFT_SUFFIX, SEQ, Axes, Schedule, Step, schedule
from mixt_export.network.order import Order

_LONE = 256
"""Numbers per token from which two permutations of one axis each replace one of several that moves number by number.

Measured on onnxruntime (CPU): 4.6 ns a number against 0.4 ns each, and an operator more is 0.8 µs.
"""

Groups = tuple[Axes, ...]
"""Which labels each axis of a value holds, row-major."""


@dataclass(frozen=True, slots=True)
class Reshape:
    """``shape`` as ONNX's Reshape reads it: 0 keeps an axis, -1 holds the positions and whatever is folded in."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Transpose:
    """``size``: numbers per token that are permuted; ``block``: how many lie together before and after."""

    name: str
    perm: tuple[int, ...]
    size: int
    block: int

    @property
    def simple(self) -> bool:
        """Whether one axis moves past its neighbours and all others keep their order."""
        return any([a for a in self.perm if a != axis] == sorted({*self.perm} - {axis}) for axis in self.perm)


@dataclass(frozen=True, slots=True)
class Product:
    """The activation times core number ``core``, whose axes hold ``layout``; see `matmuls.Step` for ``form``.

    Per token: ``batch`` products of ``rows`` x ``inner`` by ``inner`` x ``columns``.
    """

    name: str
    form: Literal["right", "left", "scale"]
    core: int
    layout: Groups
    batch: int
    rows: int
    inner: int
    columns: int


Instruction = Reshape | Transpose | Product


def program(
    branch: Branch, order: Order | None = None, left_from: int = LEFT_SUFFIX, *, flat: bool = False
) -> tuple[Instruction, ...]:
    """From x (batch, seq, ∏ in_modes) to y (batch, seq, ∏ out_modes) in ``order`` (default: the best), unscaled.

    ``left_from``: see `schedule`. ``flat``: from (batch · seq, ∏ in_modes) to (batch · seq, ∏ out_modes) instead.
    Raises NetworkError as ``best_order``.
    """
    return tuple(_Walk(branch, schedule(branch, order, left_from), flat).run())


class _Walk:
    """Carries the activation through the steps, knowing which labels each of its axes holds."""

    def __init__(self, branch: Branch, planned: Schedule, flat: bool) -> None:
        self._sizes = branch.sizes()
        self._schedule = planned
        self._batch: Groups = () if flat else ((BATCH,),)
        self._groups: Groups = (*self._batch, (SEQ,), planned.source[2:])
        self._moved = False
        """Whether the activation comes out of a Transpose that ONNX Runtime is to leave as it is; never where flat."""

    def run(self) -> Iterator[Instruction]:
        for number, step in enumerate(self._schedule.steps):
            yield from self._arrange(step.arranged, f"step{number}")
            yield from _STEPS[step.form](self, step, f"step{number}")
        yield from self._arrange(self._schedule.target, "out")
        yield from self._regroup((*self._batch, (SEQ,), self._schedule.target[2:]), "out")

    def _labels(self) -> Axes:
        """Of all axes but the batch's."""
        return tuple(label for group in self._groups[len(self._batch) :] for label in group)

    def _arrange(self, wanted: Axes, name: str) -> Iterator[Instruction]:
        """Permute the activation's labels into ``wanted``, moving neighbours that stay together as one axis."""
        current = tuple(label for group in self._groups for label in group)
        wanted = wanted if self._batch else wanted[1:]
        if current == wanted:
            return
        halfway = self._halfway(current, wanted) if self._batch else None
        if halfway is not None:
            yield from self._permute(halfway, f"{name}_first")
        yield from self._permute(wanted, name)

    def _permute(self, wanted: Axes, name: str) -> Iterator[Instruction]:
        """One Transpose from the current order of the labels to ``wanted``, behind a Reshape if it is the second."""
        current = tuple(label for group in self._groups for label in group)
        blocks = _blocks(current, wanted)
        yield from self._regroup(blocks, f"{name}_split")
        move = self._move(blocks, wanted, f"{name}_moved")
        yield move
        self._groups = tuple(blocks[axis] for axis in move.perm)
        self._moved = bool(self._batch)

    def _move(self, blocks: Groups, wanted: Axes, name: str) -> Transpose:
        """The Transpose of an activation whose axes hold ``blocks``."""
        order = sorted(range(len(blocks)), key=lambda axis: wanted.index(blocks[axis][0]))
        still = len(blocks)
        while order[still - 1] == still - 1:
            still -= 1
        block = prod(self._size(group) for group in blocks[still:])
        return Transpose(name, tuple(order), prod(self._size(group) for group in blocks), block)

    def _halfway(self, current: Axes, wanted: Axes) -> Axes | None:
        """An order between the two from and to which single axes move, or none where one Transpose does as well.

        A Transpose of several axes that ends in another axis copies numbers one at a time.
        """
        blocks = _blocks(current, wanted)
        direct = self._move(blocks, wanted, "")
        if direct.simple or direct.block > 1 or direct.size < _LONE:
            return None
        for axis in reversed(range(1, len(blocks))):
            rest = blocks[:axis] + blocks[axis + 1 :]
            for place in range(1, axis):
                order = (*rest[:place], blocks[axis], *rest[place:])
                labels = tuple(label for group in order for label in group)
                moves = (
                    self._move(_blocks(current, labels), labels, ""),
                    self._move(_blocks(labels, wanted), wanted, ""),
                )
                if all(move.simple and move.block == 1 for move in moves):
                    return labels
        return None

    def _right(self, step: Step, name: str) -> Iterator[Instruction]:
        labels = self._labels()
        rest = labels[len(step.batch) : len(labels) - len(step.summed)]
        if step.batch:
            yield from self._regroup((*self._batch, step.batch, rest, step.summed), name)
        elif self._moved or self._groups[-1] != step.summed:
            yield from self._regroup((*self._batch, *_apart(rest), step.summed), name)
        layout = (step.batch, step.summed, step.new) if step.batch else (step.summed, step.new)
        sizes = (self._size(step.batch), self._size(rest), self._size(step.summed), self._size(step.new))
        yield Product(f"{name}_y", "right", step.core, layout, *sizes)
        self._groups = (*self._groups[:-1], step.new)

    def _left(self, step: Step, name: str) -> Iterator[Instruction]:
        labels = self._labels()
        start = labels.index(step.summed[0])
        before, after = labels[:start], labels[start + len(step.summed) :]
        yield from self._regroup((*self._batch, *_apart(before), step.summed, after), name)
        sizes = (self._size(before), self._size(after), self._size(step.summed), self._size(step.new))
        yield Product(f"{name}_y", "left", step.core, (step.new, step.summed), *sizes)
        self._groups = (*self._batch, *_apart(before), step.new, after)

    def _scale(self, step: Step, name: str) -> Iterator[Instruction]:
        labels = self._labels()
        rest = labels[: len(labels) - len(step.batch)]
        yield from self._regroup((*self._batch, *_apart(rest), step.batch), name)
        yield Product(f"{name}_y", "scale", step.core, (step.batch,), self._size(step.batch), self._size(rest), 1, 1)

    def _regroup(self, groups: Groups, name: str) -> Iterator[Instruction]:
        """Reshape the activation so that its axes hold ``groups``; nothing when the shape stays.

        A Transpose is followed by a Reshape all the same: it keeps ONNX Runtime from making one Transpose of two, and
        from making it part of the product behind it (MatmulTransposeFusion), which then runs token by token and goes
        through the weight once for each.
        """
        if self._shape(groups) != self._shape(self._groups) or self._moved:
            shape = [self._dim(group) for group in groups]
            if self._batch:
                keeps_seq = groups[1] == (SEQ,) == self._groups[1]
                shape[:2] = [0, 0 if keeps_seq else shape[1]]
            yield Reshape(f"{name}_grouped", tuple(shape))
        self._moved = False
        self._groups = groups

    def _size(self, labels: Axes) -> int:
        return prod(self._sizes[label] for label in labels if label not in (BATCH, SEQ))

    def _dim(self, group: Axes) -> int:
        return -1 if SEQ in group else self._size(group)

    def _shape(self, groups: Groups) -> list[tuple[bool, bool, int]]:
        """Per axis: does it hold the batch, does it hold the positions, and the product of its labels' sizes."""
        return [(BATCH in group, SEQ in group, self._size(group)) for group in groups]


_STEPS = {"right": _Walk._right, "left": _Walk._left, "scale": _Walk._scale}


def _blocks(current: Axes, wanted: Axes) -> Groups:
    """Longest runs of labels that are neighbours in both orders."""
    blocks: list[Axes] = []
    for label in current:
        position = wanted.index(label)
        joins = blocks and position > 0 and wanted[position - 1] == blocks[-1][-1] and label not in (BATCH, SEQ)
        if joins and blocks[-1][-1] not in (BATCH, SEQ):
            blocks[-1] = (*blocks[-1], label)
        else:
            blocks.append((label,))
    return tuple(blocks)


def _apart(labels: Axes) -> Groups:
    """One axis, with the positions on an axis of their own where they come first: a Reshape then keeps their size."""
    if labels[:1] != (SEQ,):
        return (labels,)
    return ((SEQ,), labels[1:]) if labels[1:] else ((SEQ,),)
