"""JSON from untrusted files: absent is empty, anything but one object is one sentence."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

from mixt_export.checkpoints.strictjson import MAX_BYTES, load_object, load_optional, parse_object
from mixt_export.errors import CheckpointError


@pytest.mark.parametrize("text", ["[1]", "{", '{"a": ' * 5000])
def test_json_that_is_none(text: str, tmp_path: Path) -> None:
    path = tmp_path / "mixt_manifest.json"
    assert load_optional(path) == {}
    path.write_text(text)
    with pytest.raises(CheckpointError, match=r"mixt_manifest\.json"):
        load_optional(path)


def test_a_small_file_takes_little_memory(tmp_path: Path) -> None:
    """``read(n)`` takes memory for n bytes before it reads one."""
    path = tmp_path / "x.json"
    path.write_text('{"a": 1}')
    tracemalloc.start()
    try:
        assert load_object(path) == {"a": 1}
        assert tracemalloc.get_traced_memory()[1] < MAX_BYTES // 100
    finally:
        tracemalloc.stop()


def test_half_a_character_is_refused() -> None:
    assert parse_object(b'{"a": "\\ud83d\\ude00"}', "x") == {"a": "\U0001f600"}
    for text in (b'{"a": "\\ud800"}', b'{"\\uDFFF": 1}'):
        with pytest.raises(CheckpointError, match="half a surrogate pair"):
            parse_object(text, "x")
