"""NaN and Inf are found wherever they are; finite extremes are not."""

from __future__ import annotations

import hashlib
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from mixt_export.checkpoints import check_finite, open_checkpoint
from mixt_export.errors import CheckpointError
from tests.checkpoints.raw import file_bytes, tensor, write_folder
from tests.tiny import DTYPES, write_tiny

CODES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
KINDS = {**DTYPES, "float64": np.dtype(np.float64)}


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("index", [0, 400_003, 701 * 1001 - 1])
def test_bad_values_are_found(tmp_path: Path, dtype: str, value: float, index: int) -> None:
    """In the first, a middle and the last piece; the sentence names file, tensor, layer and element."""
    name = "model.layers.17.mlp.up_proj.core0"
    data = np.full((701, 1001), 0.5, KINDS[dtype])
    data.reshape(-1)[index] = value
    header = {name: tensor(CODES[dtype], [701, 1001], 0, data.nbytes)}
    folder = write_folder(tmp_path, file_bytes(header, data.tobytes()))
    with pytest.raises(CheckpointError) as caught:
        check_finite(open_checkpoint(folder).store)
    assert str(caught.value) == (
        f"{folder / 'model.safetensors'}: tensor '{name}' of layer 17 holds {float(value)} at element "
        f"({index // 1001}, {index % 1001}); download or compress the model again."
    )


@pytest.mark.parametrize("dtype", KINDS)
def test_extremes_are_finite(tmp_path: Path, dtype: str) -> None:
    limits = ml_dtypes.finfo(KINDS[dtype])
    values = [limits.max, limits.min, limits.tiny, limits.smallest_subnormal, 0.0, -0.0]
    data = np.array(values).astype(KINDS[dtype])
    header = {"a": tensor(CODES[dtype], [6], 0, data.nbytes), "n": tensor("I8", [2], data.nbytes, data.nbytes + 2)}
    folder = write_folder(tmp_path, file_bytes(header, data.tobytes() + b"\xff\xff"))
    assert check_finite(open_checkpoint(folder).store) == {}


def test_only_the_names_asked_for(tmp_path: Path) -> None:
    data = np.array([1.0, np.nan], np.float32).tobytes()
    header = {"good": tensor("F32", [1], 0, 4), "bad": tensor("F32", [1], 4, 8)}
    store = open_checkpoint(write_folder(tmp_path, file_bytes(header, data))).store
    check_finite(store, ["good"])
    check_finite(store, ["good"], digests=True)
    with pytest.raises(CheckpointError, match=r"tensor 'bad' holds nan at element \(0,\)"):
        check_finite(store, ["bad"])
    with pytest.raises(CheckpointError, match="tensor 'ugly' is missing"):
        check_finite(store, ["ugly"])


@pytest.mark.parametrize("shards", [1, 3])
def test_digests_are_those_of_the_files(tmp_path: Path, shards: int) -> None:
    store = open_checkpoint(write_tiny(tmp_path, shards=shards, dtype="bfloat16")).store
    expected = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in tmp_path.glob("*.safetensors")}
    assert check_finite(store, digests=True) == expected
    assert check_finite(store, ["model.norm.weight"], digests=True) == expected


def test_progress_counts_every_byte(tmp_path: Path) -> None:
    from contextlib import contextmanager

    class Recorder:
        def __init__(self) -> None:
            self.total, self.done = 0, 0

        @contextmanager
        def task(self, label, total=None):
            self.total = total
            yield self.advance

        def advance(self, units: int) -> None:
            self.done += units

        def note(self, message: str) -> None:
            raise AssertionError(message)

    recorder = Recorder()
    store = open_checkpoint(write_tiny(tmp_path, shards=2)).store
    check_finite(store, progress=recorder)
    assert recorder.done == recorder.total == store.nbytes
