"""The streaming writer against the safetensors library."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from mixt_export.sample.safetensors_stream import write_float32
from tests.sample import tiny


def test_pieces_become_whole_tensors_in_the_given_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {"z": rng.standard_normal((5, 3)), "a": rng.standard_normal(7), "m": rng.standard_normal((2, 2, 2))}
    tensors = {name: value.astype("f4") for name, value in tensors.items()}
    pieces = [("z", tensors["z"][:2]), ("z", tensors["z"][2:]), ("a", tensors["a"]), ("m", tensors["m"])]
    path = tmp_path / "w.safetensors"
    digest = write_float32(path, {name: value.shape for name, value in tensors.items()}, pieces)
    assert digest == tiny.sha256(path)
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(loaded[name], value)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert (8 + length) % 4096 == 0
    header = json.loads(data[8 : 8 + length])
    assert header["z"]["data_offsets"] == [0, 60]
    assert header["a"]["data_offsets"] == [60, 88]


@pytest.mark.parametrize(
    "pieces",
    [
        [("a", (2, 3))],
        [("a", (2, 3)), ("b", (1,))],
        [("b", (4,)), ("a", (2, 3))],
        [("a", (3, 3)), ("b", (4,))],
        [("a", (2, 3)), ("b", (4,)), ("c", (1,))],
        [("a", (3, 2)), ("b", (4,))],
    ],
)
def test_pieces_that_do_not_fill_the_tensors(tmp_path: Path, pieces: list[tuple[str, tuple[int, ...]]]) -> None:
    given = [(name, np.zeros(shape, "f4")) for name, shape in pieces]
    with pytest.raises(ValueError, match="tensor"):
        write_float32(tmp_path / "w.safetensors", {"a": (2, 3), "b": (4,)}, given)
