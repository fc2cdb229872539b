"""The safetensors header: everything a file may claim falsely is refused with one sentence."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from mixt_export.checkpoints import open_checkpoint
from mixt_export.checkpoints.header import read_header
from mixt_export.errors import CheckpointError, MixtError, UnsupportedError
from tests.checkpoints.raw import file_bytes, tensor, write_folder

EIGHT = bytes(8)
TWO = {"a": tensor("F32", [1], 0, 4), "b": tensor("F32", [1], 4, 8)}

BAD = {
    "empty file": (b"", "too few for a safetensors file"),
    "seven bytes": (bytes(7), "too few for a safetensors file"),
    "huge header length": (file_bytes(TWO, EIGHT, length=2**63), "claims a header of 9223372036854775808 bytes"),
    "above 100 MB": (file_bytes(TWO, EIGHT, length=100_000_001), "more than the 100000000 that safetensors allows"),
    "header beyond file": (file_bytes(TWO, EIGHT, length=5000), "truncated"),
    "truncated data": (file_bytes(TWO, EIGHT)[:-1], "tensor 'b' claims bytes 4 to 8, but the file has only 7"),
    "more than the file has": (
        file_bytes({"a": tensor("F32", [10**9], 0, 4 * 10**9)}, EIGHT),
        "tensor 'a' claims bytes 0 to 4000000000, but the file has only 8 bytes",
    ),
    "not JSON": (file_bytes(b"{nonsense", EIGHT), "not valid JSON"),
    "a list": (file_bytes(b"[]", EIGHT), "not a JSON object"),
    "leading space": (file_bytes(b" {}", b""), "not a JSON object"),
    "not UTF-8": (file_bytes(b'{"\xff":1}', EIGHT), "not UTF-8"),
    "deep nesting": (file_bytes(b'{"a":' + b"[" * 200_000, EIGHT), "nested too deeply"),
    "NaN": (file_bytes(b'{"a":NaN}', EIGHT), "NaN is not JSON"),
    "long number": (file_bytes(b'{"a":' + b"9" * 10_000 + b"}", EIGHT), "not valid JSON"),
    "duplicate tensor": (
        file_bytes(b'{"a":' + json.dumps(TWO["a"]).encode() + b',"a":' + json.dumps(TWO["b"]).encode() + b"}", EIGHT),
        "'a' occurs twice",
    ),
    "duplicate field": (
        file_bytes(b'{"a":{"dtype":"F32","dtype":"F16","shape":[2],"data_offsets":[0,8]}}', EIGHT),
        "'dtype' occurs twice",
    ),
    "empty name": (file_bytes({"": tensor("F32", [2], 0, 8)}, EIGHT), "empty name"),
    "unknown dtype": (file_bytes({"a": tensor("F33", [2], 0, 8)}, EIGHT), "unknown dtype 'F33'"),
    "dtype no string": (file_bytes({"a": tensor([], [2], 0, 8)}, EIGHT), "unknown dtype []"),  # type: ignore[arg-type]
    "field missing": (file_bytes({"a": {"dtype": "F32", "shape": [2]}}, EIGHT), "exactly dtype, shape"),
    "unknown field": (file_bytes({"a": {**tensor("F32", [2], 0, 8), "x": 1}}, EIGHT), "exactly dtype, shape"),
    "field no object": (file_bytes({"a": 3}, EIGHT), "exactly dtype, shape"),
    "negative size": (file_bytes({"a": tensor("F32", [-2], 0, 8)}, EIGHT), "has a shape that is not a list"),
    "bool size": (file_bytes({"a": tensor("F32", [2, True], 0, 8)}, EIGHT), "has a shape that is not a list"),
    "float size": (file_bytes({"a": tensor("F32", [2.0], 0, 8)}, EIGHT), "has a shape that is not a list"),  # type: ignore[list-item]
    "too many axes": (
        file_bytes({"a": tensor("F32", [1] * 31 + [2, 1], 0, 8)}, EIGHT),
        "has a shape that is not a list",
    ),
    "overflowing product": (file_bytes({"a": tensor("F32", [2**62, 4], 0, 8)}, EIGHT), "impossible shape"),
    "huge empty": (file_bytes({"a": tensor("F32", [0, 2**62], 0, 0)}, b""), "impossible shape"),
    "size disagrees": (
        file_bytes({"a": tensor("F32", [3], 0, 8)}, EIGHT),
        "needs 12 bytes, but its data_offsets span 8",
    ),
    "offsets reversed": (file_bytes({"a": tensor("F32", [2], 8, 0)}, EIGHT), "data_offsets that are not [begin, end]"),
    "offsets negative": (file_bytes({"a": tensor("F32", [2], -8, 0)}, EIGHT), "data_offsets that are not [begin, end]"),
    "overlap": (
        file_bytes({"a": tensor("F32", [1], 0, 4), "b": tensor("F16", [3], 2, 8)}, EIGHT),
        "tensor 'b' overlaps tensor 'a'",
    ),
    "hole": (
        file_bytes({"a": tensor("F16", [1], 0, 2), "b": tensor("F32", [1], 4, 8)}, EIGHT),
        "tensor 'b' leaves a hole after tensor 'a'",
    ),
    "hole at start": (file_bytes({"b": tensor("F32", [1], 4, 8)}, EIGHT), "leaves a hole after the header"),
    "left over": (file_bytes({"a": tensor("F32", [1], 0, 4)}, EIGHT), "4 bytes after tensor 'a' belong to no tensor"),
    "bad metadata": (file_bytes({"__metadata__": {"a": 1}}, b""), "__metadata__"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_header_is_refused(tmp_path: Path, case: str) -> None:
    content, expected = BAD[case]
    folder = write_folder(tmp_path / "model", content)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    message = str(caught.value)
    assert expected in message
    assert message.startswith(str(folder / "model.safetensors"))
    assert message.endswith("again.")
    assert "\n" not in message
    assert len(message) < len(str(folder)) + 400
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("code", ["F8_E4M3", "U16", "C64", "F4"])
def test_valid_but_unhandled_dtype(tmp_path: Path, code: str) -> None:
    folder = write_folder(tmp_path, file_bytes({"a": tensor(code, [8], 0, 8)}, EIGHT))
    with pytest.raises(UnsupportedError, match=rf"tensor 'a' has dtype {code}, which .* start from float32"):
        open_checkpoint(folder)


def test_good_header(tmp_path: Path) -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "last": tensor("BF16", [3], 10, 16),
        "empty": tensor("F32", [0, 5], 10, 10),
        "scalar": tensor("F64", [], 0, 8),
        "flags": tensor("BOOL", [2], 8, 10),
    }
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_bytes(json.dumps(header).encode() + b"   ", bytes(16)))
    read = read_header(path)
    assert list(read.entries) == ["scalar", "flags", "empty", "last"]
    assert read.metadata == {"format": "pt"}
    assert read.entries["last"].offset == path.stat().st_size - 6
    assert [entry.dtype for entry in read.entries.values()] == ["float64", "bool", "float32", "bfloat16"]
    assert read.entries["scalar"].shape == ()


ORIGINAL = save({"w": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.ones(5, np.float16)}, {"format": "pt"})
LENGTH = int.from_bytes(ORIGINAL[:8], "little") + 8


@st.composite
def mutations(draw: st.DrawFn) -> bytes:
    content = bytearray(ORIGINAL)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, LENGTH - 1))
        content[at] = draw(st.one_of(st.integers(0, 255), st.sampled_from(b'{}[],:"0123456789-eE')))
    if draw(st.booleans()):
        del content[draw(st.integers(0, len(content) - 1)) :]
    if draw(st.booleans()):
        at = draw(st.integers(8, max(8, len(content))))
        content[at:at] = draw(st.binary(max_size=6))
    return bytes(content)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=mutations())
def test_mutated_header_never_surprises(tmp_path: Path, content: bytes) -> None:
    """Any mutation is read consistently or refused with a documented error, without allocating what it claims."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        header = read_header(path)
    except MixtError as error:
        assert str(error).startswith(str(path))
    else:
        assert sum(entry.nbytes for entry in header.entries.values()) == len(content) - header.data_start
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 1_000_000
