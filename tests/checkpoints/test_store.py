"""Reading tensors: dtypes, shards, conversion, links, bounded memory."""

from __future__ import annotations

import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from mixt_export.checkpoints import TensorStore, open_checkpoint
from mixt_export.errors import CheckpointError, UnsupportedError
from tests.checkpoints.raw import file_bytes, tensor, write_folder
from tests.checkpoints.resident import growth_kb
from tests.tiny import tiny_tensors, write_tiny

INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_reads_what_safetensors_wrote(tmp_path: Path, dtype: str, shards: int) -> None:
    checkpoint = open_checkpoint(write_tiny(tmp_path, "qwen3", tied=False, dtype=dtype, shards=shards, hidden_size=44))
    expected = tiny_tensors(checkpoint.config, dtype)
    assert set(checkpoint.store) == set(expected)
    assert len(checkpoint.store.files) == shards
    assert checkpoint.store.nbytes == sum(value.nbytes for value in expected.values())
    for name, value in expected.items():
        read = checkpoint.store.read(name)
        assert read.dtype == value.dtype
        assert read.tobytes() == value.tobytes()
        assert checkpoint.store.read(name, "float64").tolist() == value.astype(np.float64).tolist()
        assert checkpoint.store.read(name, "float32").tobytes() == value.astype(np.float32).tobytes()
        assert np.array_equal(checkpoint.store.array(name), value)
        pieces = list(checkpoint.store.chunks(name, 1001))
        assert b"".join(pieces) == value.tobytes()
        assert all(len(piece) <= 1001 and len(piece) % value.itemsize == 0 for piece in pieces)


def test_every_dtype_and_odd_shapes(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    arrays = {
        "I64": rng.integers(-9, 9, (3, 1)),
        "F64": rng.standard_normal(()),
        "I32": rng.integers(-9, 9, (2, 3)).astype(np.int32),
        "F32": np.empty((4, 0), np.float32),
        "I16": rng.integers(-9, 9, 5).astype(np.int16),
        "U8": rng.integers(0, 255, 3).astype(np.uint8),
        "I8": rng.integers(-9, 9, 7).astype(np.int8),
        "BOOL": np.array([[True, False, True]]),
        "BF16": rng.standard_normal(4).astype(ml_dtypes.bfloat16),
    }
    header, data = {}, b""
    for code, value in arrays.items():
        value = np.asarray(value)
        header[code] = tensor(code, list(value.shape), len(data), len(data) + value.nbytes)
        data += value.tobytes()
    store = open_checkpoint(write_folder(tmp_path, file_bytes(header, data))).store
    for code, value in arrays.items():
        value = np.asarray(value)
        for read in (store.read(code), store.array(code)):
            assert (read.dtype, read.shape, read.tobytes()) == (value.dtype, value.shape, value.tobytes())
        assert b"".join(store.chunks(code, 1)) == value.tobytes()
    with pytest.raises(CheckpointError, match=r"tensor 'nope' is missing"):
        store.read("nope")


def test_bool_bytes_beyond_one(tmp_path: Path) -> None:
    store = open_checkpoint(write_folder(tmp_path, file_bytes({"a": tensor("BOOL", [2], 0, 2)}, b"\x01\x02"))).store
    with pytest.raises(CheckpointError, match="tensor 'a' of dtype bool holds bytes other than 0 and 1"):
        store.read("a")


@pytest.mark.parametrize(("source", "target"), [("F32", "float16"), ("BF16", "float16"), ("F64", "float32")])
def test_conversion_that_overflows(tmp_path: Path, source: str, target: str) -> None:
    kind = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F64": np.float64}[source]
    data = np.array([1.0, 1e30 if target == "float16" else 1e300], kind)
    store = open_checkpoint(
        write_folder(tmp_path, file_bytes({"a": tensor(source, [2], 0, data.nbytes)}, data.tobytes()))
    )
    with pytest.raises(UnsupportedError, match=rf"tensor 'a' holds values that do not fit {target}"):
        store.store.read("a", target)


def test_conversion_keeps_infinity(tmp_path: Path) -> None:
    data = np.array([np.inf, np.nan, 65504.0], np.float32)
    store = open_checkpoint(write_folder(tmp_path, file_bytes({"a": tensor("F32", [3], 0, 12)}, data.tobytes()))).store
    assert np.array_equal(store.read("a", "float16"), data.astype(np.float16), equal_nan=True)


def test_file_that_shrinks_after_opening(tmp_path: Path) -> None:
    store = open_checkpoint(write_tiny(tmp_path)).store
    name = list(store)[-1]
    os.truncate(store[name].path, store[name].offset + 5)
    for read in (lambda: store.read(name), lambda: list(store.chunks(name)), lambda: store.read(name, "float64")):
        with pytest.raises(CheckpointError, match=r"ends inside the tensor .* run again"):
            read()


def _edit_index(folder: Path, **weights: str | None) -> None:
    index = json.loads((folder / INDEX).read_text())
    for name, file in weights.items():
        index["weight_map"][name] = file
    (folder / INDEX).write_text(json.dumps(index))


def test_missing_shards_are_listed(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, shards=4)
    for number in (2, 4):
        (folder / f"model-0000{number}-of-00004.safetensors").unlink()
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert str(caught.value) == (
        f"{folder}: 2 of 4 shards are missing (model-00002-of-00004.safetensors, model-00004-of-00004.safetensors); "
        "download them too."
    )


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "..",
        "",
        "x\0.safetensors",
        ".x.safetensors",
        "C:\\x.safetensors",
        "pw",
    ],
)
def test_shard_names_that_are_paths(tmp_path: Path, name: str) -> None:
    folder = write_tiny(tmp_path / "m", shards=2)
    (tmp_path / "x.safetensors").write_bytes(b"")
    _edit_index(folder, extra=name)
    with pytest.raises(CheckpointError, match="is not the plain name of a safetensors file in the folder") as caught:
        open_checkpoint(folder)
    assert repr(name) in str(caught.value)


def test_weight_in_two_shards(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, shards=2)
    (folder / "more.safetensors").write_bytes(file_bytes({"model.norm.weight": tensor("F32", [2], 0, 8)}, bytes(8)))
    _edit_index(folder, other="more.safetensors")
    with pytest.raises(CheckpointError, match=r"'model.norm.weight' is also in model-00002-of-00002"):
        open_checkpoint(folder)


def test_index_and_shards_disagree(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "a", shards=2)
    _edit_index(folder, absent="model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"1 of its tensors are in none of the shards \(absent\)"):
        open_checkpoint(folder)
    folder = write_tiny(tmp_path / "b", shards=2)
    _edit_index(folder, **{"model.norm.weight": "model-00001-of-00002.safetensors"})
    with pytest.raises(
        CheckpointError, match=r"'model.norm.weight', which model.safetensors.index.json does not place"
    ):
        open_checkpoint(folder)


@pytest.mark.parametrize("text", ['{"weight_map": []}', '{"weight_map": {"a": 1}}', "{}"])
def test_index_without_weight_map(tmp_path: Path, text: str) -> None:
    folder = write_folder(tmp_path, None)
    (folder / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match="weight_map must map tensor names to file names"):
        open_checkpoint(folder)


def test_hugging_face_cache_is_followed(tmp_path: Path) -> None:
    """snapshots/<revision>/file -> ../../blobs/<hash>, as huggingface_hub lays models out."""
    repository = tmp_path / "models--org--name"
    plain = write_tiny(tmp_path / "plain", shards=2)
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(plain.iterdir())):
        file.rename(repository / "blobs" / f"{number:040x}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{number:040x}")
    checkpoint = open_checkpoint(snapshot)
    assert checkpoint.store.read("model.norm.weight").shape == (48,)
    assert [file.name for file in checkpoint.companions()] == [
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "mixt_factors.json"])
def test_links_out_of_the_folder_are_not_followed(tmp_path: Path, name: str) -> None:
    folder = write_tiny(tmp_path / "m")
    outside = tmp_path / "outside"
    outside.write_bytes((folder / name).read_bytes() if (folder / name).exists() else b"{}")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(outside)
    with pytest.raises(CheckpointError, match=r"is a link that leads out of the model folder .* copy the file into"):
        open_checkpoint(folder).companions()


def test_blobs_of_another_repository_are_outside(tmp_path: Path) -> None:
    other = tmp_path / "other" / "blobs"
    other.mkdir(parents=True)
    folder = write_tiny(tmp_path / "repo" / "snapshots" / "abc")
    (folder / "model.safetensors").rename(other / "x")
    (folder / "model.safetensors").symlink_to(other / "x")
    with pytest.raises(CheckpointError, match="leads out of the model folder"):
        open_checkpoint(folder)


def test_links_within_the_folder_dangling_links_and_pipes(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "real.bin")
    (folder / "model.safetensors").symlink_to("real.bin")
    assert len(open_checkpoint(folder).store) == 29
    (folder / "real.bin").unlink()
    with pytest.raises(CheckpointError, match="link to a file that does not exist"):
        open_checkpoint(folder)
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="is not a regular file"):
        open_checkpoint(folder)


SETUP = """
from mixt_export.checkpoints import check_finite, open_checkpoint
store = open_checkpoint(sys.argv[1]).store
"""
READ = """
for name in store:
    assert sum(map(len, store.chunks(name))) == store[name].nbytes
check_finite(store, digests=True)
"""


def test_streaming_keeps_memory_flat(tmp_path: Path) -> None:
    """Reading 96 MB in pieces raises the resident size by a few MB, whatever the size of the tensors."""
    size = 48_000_000
    header = {"a": tensor("F32", [size // 4], 0, size), "b": tensor("F32", [size // 4], size, 2 * size)}
    folder = write_folder(tmp_path, file_bytes(header, b""))
    with (folder / "model.safetensors").open("ab") as file:
        file.truncate(file.tell() + 2 * size)
    assert growth_kb(SETUP, READ, str(folder)) < 12_000


def test_store_is_a_mapping(tmp_path: Path) -> None:
    store = open_checkpoint(write_tiny(tmp_path)).store
    assert isinstance(store, TensorStore)
    name, stored = next(iter(store.items()))
    assert store.refs[name] == stored.ref
    assert "nope" not in store
    assert stored.nbytes == stored.ref.nbytes
