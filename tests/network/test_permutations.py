"""What a program says of its permutations: how many numbers lie together, whether one axis moves alone."""

from __future__ import annotations

from itertools import pairwise

import pytest

from mixt_export.network import FactorizedLinear, build
from mixt_export.network.program import Reshape, Transpose, program


@pytest.mark.parametrize(
    ("perm", "simple"),
    [
        ((0, 2, 1), True),
        ((0, 3, 1, 2), True),
        ((0, 2, 3, 1), True),
        ((1, 2, 3, 0), True),
        ((0, 3, 2, 1), False),
        ((0, 2, 1, 4, 3), False),
        ((0, 3, 4, 1, 2), False),
    ],
)
def test_one_axis_moves_or_several(perm: tuple[int, ...], simple: bool) -> None:
    assert Transpose("t", perm, 1, 1).simple is simple


def test_blast_moves_blocks_and_then_lone_numbers() -> None:
    """x (seq, 8 j, 72 q) -> (j, seq, q): 72 at once; (j, seq, r) -> (r, seq, j): one by one; and back."""
    (branch,) = build.blast("l", 576, 576, 24, (8, 8)).branches
    moves = [step for step in program(branch) if isinstance(step, Transpose)]
    assert [(step.block, step.size) for step in moves] == [(72, 576), (1, 192), (1, 192), (72, 576)]
    assert [step.simple for step in moves] == [True, False, False, True]


def test_many_lone_numbers_move_one_axis_at_a_time() -> None:
    """(j, seq, r) -> (r, seq, j), 576 numbers a token: r moves to the front, then j behind seq; and back likewise."""
    (branch,) = build.blast("l", 576, 576, 72, (8, 8)).branches
    moves = [step for step in program(branch) if isinstance(step, Transpose)]
    assert [(step.block, step.size) for step in moves] == [(72, 576), *[(1, 576)] * 4, (72, 576)]
    assert all(step.simple for step in moves)
    flat = [step for step in program(branch, flat=True) if isinstance(step, Transpose)]
    assert [step.simple for step in flat] == [True, False, False, True]


@pytest.mark.parametrize(
    "linear",
    [
        build.blast("l", 576, 576, 72, (8, 8)),
        build.blast("l", 576, 576, 24, (8, 8)),
        build.monarch("l", (24, 24), (24, 24)),
        build.tensor_train("l", (8, 8, 9), (8, 8, 9), (8, 8)),
        build.tensor_train("l", (4, 6, 4, 6), (4, 6, 4, 6), (8, 8, 8)),
    ],
    ids=lambda linear: linear.method,
)
def test_a_reshape_follows_every_transpose(linear: FactorizedLinear) -> None:
    for branch in linear.branches:
        for order in (tuple(range(len(branch.cores))), tuple(reversed(range(len(branch.cores))))):
            steps = program(branch, order)
            behind = [after for step, after in pairwise(steps) if isinstance(step, Transpose)]
            assert behind and all(isinstance(step, Reshape) for step in behind)
