"""Blocks and numbers chosen by text."""

from __future__ import annotations

import pytest

from mixt_export.errors import UsageError
from mixt_export.selection import fewer, parse_blocks, parse_sizes, size_of


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("all", (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)),
        ("last:3", (7, 8, 9)),
        ("first:2", (0, 1)),
        ("last:10", tuple(range(10))),
        ("0,3,7-9", (0, 3, 7, 8, 9)),
        (" 7-9 , 8, 0 ", (0, 7, 8, 9)),
        ("4", (4,)),
    ],
)
def test_blocks(text: str, expected: tuple[int, ...]) -> None:
    assert parse_blocks(text, 10) == expected


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("last:11", "give last:1 to last:10"),
        ("first:0", "give first:1 to first:10"),
        ("3,10", "blocks 0 to 9; there is no block 10"),
        ("9-7", "runs backwards; write 7-9"),
        ("", "'' is not understood"),
        ("1,,2", "'' is not understood"),
        ("-1", "'-1' is not understood"),
        ("every", "'every' is not understood"),
        ("last:9999999999", "is not understood"),
        ("٣", "is not understood"),
    ],
)
def test_blocks_refused(text: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        parse_blocks(text, 10)


def test_sizes() -> None:
    sizes = parse_sizes(["4", "q_proj=2", r"layers\.7\.=3"], "--n-tensors")
    assert sizes[0] == 4
    assert [(pattern.pattern, number) for pattern, number in sizes[1]] == [("q_proj", 2), (r"layers\.7\.", 3)]
    assert size_of("model.layers.1.mlp.up_proj", sizes) == 4
    assert size_of("model.layers.1.self_attn.q_proj", sizes) == 2
    assert size_of("model.layers.7.self_attn.q_proj", sizes) == 3  # the later rule
    assert parse_sizes([], "--n-tensors") == (None, [])
    assert size_of("q_proj", parse_sizes(["up=5"], "--n-tensors")) is None


@pytest.mark.parametrize("item", ["", "0", "x", "q_proj=", "=2", "q_proj=0", "q_proj=1.5", "-3", "4 5", "99999999999"])
def test_sizes_refused(item: str) -> None:
    with pytest.raises(UsageError, match=r"--n-tensors .*give a number of at least 1, or TYPE=NUMBER"):
        parse_sizes([item], "--n-tensors")


def test_contradicting_and_broken_rules() -> None:
    with pytest.raises(UsageError, match="--n-tensors is 4 and 2 for every linear"):
        parse_sizes(["4", "2"], "--n-tensors")
    with pytest.raises(UsageError, match="not a regular expression"):
        parse_sizes(["(=2"], "--n-tensors")


@pytest.mark.parametrize(("text", "count", "wanted"), [("last:4", 3, True), ("last:4", 4, False), ("all", 1, False)])
def test_fewer_blocks_than_asked_for(text: str, count: int, wanted: bool) -> None:
    assert fewer(text, count) is wanted
