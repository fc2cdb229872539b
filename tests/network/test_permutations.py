"""What a program says of its permutations: how many numbers lie together, whether one axis moves alone."""

from __future__ import annotations

import pytest

from mixt_export.network import build
from mixt_export.network.program import Transpose, program


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
