"""Virtual tensors: read, checked, written, run and exported like stored ones, and never linked."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from mixt_export import network
from mixt_export.checkpoints import (
    Checkpoint,
    Made,
    TensorStore,
    check_finite,
    open_checkpoint,
    overlaid,
    write_checkpoint,
)
from mixt_export.errors import CheckpointError, MixtError, NetworkError, UnsupportedError
from mixt_export.lower.weights import Weights
from mixt_export.network import build
from tests.tiny import write_tiny, write_tiny_low_rank

UP = "model.layers.1.mlp.up_proj"


def made(values: np.ndarray[Any, Any], dtype: str = "float32") -> Made:
    return Made(dtype, values.shape, values.copy)


def factorised(checkpoint: Checkpoint, seed: int = 3) -> tuple[Checkpoint, np.ndarray[Any, Any]]:
    """``checkpoint`` with UP replaced by two virtual cores of rank 5, and the (out, in) float64 product."""
    rng = np.random.default_rng(seed)
    first, second = rng.standard_normal((48, 5)), rng.standard_normal((5, 104))
    linear = build.low_rank(UP, 48, 104, 5)
    tensors = {f"{UP}.core0": made(first), f"{UP}.core1": made(second)}
    dense = (first.astype(np.float32).astype(float) @ second.astype(np.float32).astype(float)).T
    return overlaid(checkpoint, tensors, {UP: linear}), dense


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("wanted", ["float32", "float64", "bfloat16"])
def test_every_way_of_reading_gives_the_same_value(tmp_path: Path, dtype: str, wanted: str) -> None:
    checkpoint = open_checkpoint(write_tiny(tmp_path))
    values = np.random.default_rng(0).standard_normal((7, 3, 5))
    store = overlaid(checkpoint, {"extra": made(values, dtype)}).store
    kinds = {"bfloat16": np.dtype(ml_dtypes.bfloat16)}
    stored = values.astype(kinds.get(dtype, dtype))
    assert store["extra"].nbytes == stored.nbytes
    for found in (store.read("extra"), store.array("extra")):
        assert found.dtype == stored.dtype
        np.testing.assert_array_equal(found, stored)
    np.testing.assert_array_equal(store.read("extra", wanted), stored.astype(kinds.get(wanted, wanted)))
    assert b"".join(store.chunks("extra", 24)) == stored.tobytes()
    assert max(map(len, store.chunks("extra", 24))) <= 24


def test_replaced_tensors_hide_the_stored_ones(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny(tmp_path))
    name = f"{UP}.weight"
    over = overlaid(checkpoint, {name: made(np.full((104, 48), 2.0))})
    assert set(over.store) == set(checkpoint.store)
    assert over.store.read(name).max() == 2.0
    assert checkpoint.store.read(name).max() != 2.0
    again = overlaid(over, {name: made(over.store.read(name, "float64") * 2)})
    assert again.store.read(name).min() == 4.0


def test_a_linear_that_is_factorised_loses_its_dense_weight_and_dead_cores_go(tmp_path: Path) -> None:
    base = write_tiny(tmp_path / "base")
    over, dense = factorised(open_checkpoint(base))
    assert f"{UP}.weight" not in over.store
    found = network.densify(over.factors[UP], over.store.read)
    np.testing.assert_allclose(found, dense, rtol=1e-14, atol=1e-14 * np.abs(dense).max())
    low_rank = open_checkpoint(write_tiny_low_rank(tmp_path / "low", base))
    other = build.low_rank(UP, 48, 104, 5, names=(f"{UP}.new0", f"{UP}.new1"))
    tensors = {f"{UP}.new0": made(np.ones((48, 5))), f"{UP}.new1": made(np.ones((5, 104)))}
    again = overlaid(low_rank, tensors, {UP: other})
    assert f"{UP}.core0" not in again.store
    assert set(again.factors) == set(low_rank.factors)


def test_factors_must_fit_the_tensors(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny(tmp_path))
    linear = build.low_rank(UP, 48, 104, 5)
    with pytest.raises(CheckpointError, match=r"needs the tensor '.*core0', which is in no weight file"):
        overlaid(checkpoint, {}, {UP: linear})
    wrong = {f"{UP}.core0": made(np.ones((48, 6))), f"{UP}.core1": made(np.ones((5, 104)))}
    with pytest.raises(NetworkError, match=r"expects the tensor '.*core0' as float32 \(48, 5\)"):
        overlaid(checkpoint, wrong, {UP: linear})


@pytest.mark.parametrize("value", [np.ones((2, 3), np.float32), np.ones((3, 2), np.int64)])
def test_a_maker_that_breaks_its_word_is_named(tmp_path: Path, value: np.ndarray[Any, Any]) -> None:
    store = overlaid(open_checkpoint(write_tiny(tmp_path)), {"extra": Made("float16", (3, 2), value.copy)}).store
    readers: tuple[Callable[[TensorStore], Any], ...] = (
        lambda store: store.read("extra"),
        lambda store: list(store.chunks("extra")),
        lambda store: store.array("extra"),
    )
    for read in readers:
        with pytest.raises(MixtError, match="announced as float16"):
            read(store)


def test_values_beyond_the_dtype_are_refused(tmp_path: Path) -> None:
    store = overlaid(open_checkpoint(write_tiny(tmp_path)), {"extra": made(np.array([1e5]), "float16")}).store
    with pytest.raises(UnsupportedError, match="'extra' holds values that do not fit float16"):
        store.read("extra")


def test_non_finite_virtual_tensors_are_found(tmp_path: Path) -> None:
    values = np.ones((3, 7))
    values[1, 2] = np.nan
    store = overlaid(open_checkpoint(write_tiny(tmp_path)), {f"{UP}.weight": made(values)}).store
    for digests in (False, True):
        with pytest.raises(CheckpointError, match=r"of layer 1 holds nan at element \(1, 2\)"):
            check_finite(store, digests=digests)
    assert check_finite(store, ["model.norm.weight"]) == {}


def test_digests_stay_those_of_the_files_whatever_is_laid_over_them(tmp_path: Path) -> None:
    """Replaced tensors are gaps, two names for the same bytes overlap, trailing bytes belong to the file."""
    checkpoint = open_checkpoint(write_tiny(tmp_path, shards=2))
    expected = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in tmp_path.glob("*.safetensors")}
    names = list(checkpoint.store)
    over = overlaid(checkpoint, {name: made(np.ones(3)) for name in (names[0], names[3], names[-1])}).store
    assert check_finite(over, digests=True) == expected
    first, second = over[names[1]], over[names[4]]
    wider = replace(first, ref=replace(first.ref, name="alias"), offset=first.offset + 4, nbytes=first.nbytes - 4)
    aliased = TensorStore({**over, "alias": wider, "twin": replace(second, ref=replace(second.ref, name="twin"))})
    assert check_finite(aliased, digests=True) == expected
    only = TensorStore({names[1]: first})
    assert check_finite(only, digests=True) == {first.path.name: expected[first.path.name]}


def test_files_that_cannot_be_linked_are_checked_and_not_hashed(tmp_path: Path) -> None:
    store = open_checkpoint(write_tiny(tmp_path)).store
    elsewhere = TensorStore({name: replace(stored, linkable=False) for name, stored in store.items()})
    assert check_finite(elsewhere, digests=True) == {}
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="ends inside"):
        check_finite(elsewhere, digests=True)


def test_virtual_and_unlinkable_tensors_are_streamed(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny(tmp_path))
    over = overlaid(checkpoint, {"model.norm.weight": made(np.ones(48))})
    unlinked = replace(
        checkpoint, store=TensorStore({name: replace(item, linkable=False) for name, item in checkpoint.store.items()})
    )
    assert Weights(checkpoint, "float32").in_place(["model.norm.weight"])
    for kind in (over, unlinked):
        weights = Weights(kind, "float32")
        assert not weights.in_place(["model.norm.weight"])
        weights.tensor("model.norm.weight")
        assert [entry.name for entry in weights.streamed] == ["model.norm.weight"]
        assert not weights.linked


def test_an_overlay_is_written_like_any_checkpoint(tmp_path: Path) -> None:
    over, dense = factorised(open_checkpoint(write_tiny(tmp_path / "base")))
    (tmp_path / "out").mkdir()
    write_checkpoint(tmp_path / "out", over, [], over.factors, {})
    back = open_checkpoint(tmp_path / "out")
    assert set(back.store) == set(over.store)
    for name in over.store:
        np.testing.assert_array_equal(back.store.read(name), over.store.read(name))
    found = network.densify(back.factors[UP], back.store.read)
    np.testing.assert_allclose(found, dense, rtol=1e-13, atol=1e-14 * np.abs(dense).max())


def test_the_reference_runs_the_overlaid_values(tmp_path: Path) -> None:
    import torch

    from mixt_export.reference import load_reference

    checkpoint = open_checkpoint(write_tiny(tmp_path))
    over, dense = factorised(checkpoint)
    written = overlaid(checkpoint, {f"{UP}.weight": made(dense)})
    tokens = torch.arange(20).reshape(2, 10)
    plain, factored, replaced = (
        load_reference(source)(input_ids=tokens).logits.numpy() for source in (checkpoint, over, written)
    )
    np.testing.assert_allclose(factored, replaced, atol=1e-5 * np.abs(replaced).max())
    assert np.abs(factored - plain).max() > 1e-2 * np.abs(plain).max()
