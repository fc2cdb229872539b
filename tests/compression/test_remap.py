"""Factors stored in 8 and 16 bits: bytes, values against plain arithmetic, versions of the format, bad folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mixt_export.checkpoints import open_checkpoint
from mixt_export.checkpoints.packed import Packed
from mixt_export.compression import Settings, compress
from mixt_export.errors import CheckpointError, NetworkError, UnsupportedError, UsageError
from mixt_export.network import TensorRef
from mixt_export.reference import load_reference
from tests.tiny import write_tiny

SETTINGS = Settings(windows=6, window=32, batch=2)


@pytest.fixture
def packed(tmp_path: Path, text: Path) -> Path:
    model = write_tiny(tmp_path / "model")
    given: dict[str, Any] = {"keep": 0.6, "calib": [text], "settings": SETTINGS, "evaluate": False}
    compress(model, tmp_path / "packed", store="remap8", **given)
    return tmp_path / "packed"


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("rest", [0, 5])
def test_parts_are_the_nearest_multiples_of_a_127th(axis: int, rest: int) -> None:
    rng = np.random.default_rng(3)
    rows = rng.normal(size=(11 + rest, 4)) * [1e-6, 1.0, 300.0, 0.0]
    values = (rows if axis == 0 else rows.T).astype(np.float32)
    item = Packed(TensorRef("x", values.shape, "float32"), axis, 11)
    parts = item.pack(values)
    assert [(part.shape, part.dtype.name) for part in parts] == [(ref.shape, ref.dtype) for ref in item.parts]
    assert sum(part.nbytes for part in parts) == item.nbytes == 11 * 4 + 4 * 4 + 2 * rest * 4
    back = item.unpack(parts)
    back = back if axis == 0 else back.T
    step = np.abs(rows[:11]).max(axis=0) / 127
    assert (np.abs(back[:11] - rows[:11]) <= step * 0.50001 + 1e-12).all()
    np.testing.assert_allclose(back[11:], rows[11:], rtol=1e-3, atol=1e-7)
    assert np.abs(parts[0]).max() == 127


def test_a_folder_holds_the_parts_and_gives_ordinary_factors(packed: Path) -> None:
    checkpoint = open_checkpoint(packed)
    report = json.loads((packed / "compress_report.json").read_text())
    stored = load_file(packed / "model.safetensors")
    assert json.loads((packed / "mixt_factors.json").read_text())["version"] == 2
    factored = [layer for layer in report["layers"] if layer["rank"] is not None]
    assert factored
    for layer in factored:
        name, rank = layer["name"], layer["rank"]
        first, second = (core.tensor for core in checkpoint.factors[name].branches[0].cores)
        small, large = sorted((layer["in_features"], layer["out_features"]))
        scales = 4 * 2 * rank
        assert layer["stored_bytes"] == 2 * large * rank + scales
        assert layer["params"] == large * rank
        assert layer["stored_bytes"] == sum(
            array.nbytes for key, array in stored.items() if key.startswith((f"{first.name}.", f"{second.name}."))
        )
        assert f"{first.name}.int8" not in checkpoint.store
        down = stored[f"{first.name}.int8"] * stored[f"{first.name}.scale"][None].astype(np.float64)
        up = stored[f"{second.name}.int8"] * stored[f"{second.name}.scale"][:, None].astype(np.float64)
        if layer["in_features"] > small:
            down = np.concatenate([down, stored[f"{first.name}.rest"]])
        if layer["out_features"] > small:
            up = np.concatenate([up, stored[f"{second.name}.rest"]], axis=1)
        np.testing.assert_allclose(checkpoint.store.read(first.name), down, rtol=1e-6)
        np.testing.assert_allclose(checkpoint.store.read(second.name), up, rtol=1e-6)
        assert 1e-4 < layer["stored_error"] < 0.03
    assert 0.595 < report["keep_achieved"] <= 0.6
    assert load_reference(packed) is not None


def test_remapping_keeps_more_ranks_and_rounds_little(tmp_path: Path, text: Path, packed: Path) -> None:
    """The same ranks without it give nearly the same factors; the same keep gives fewer ranks."""
    model = tmp_path / "model"
    report = json.loads((packed / "compress_report.json").read_text())
    ranks = {layer["name"]: layer["rank"] or "dense" for layer in report["layers"]}
    (tmp_path / "ranks.json").write_text(json.dumps(ranks))
    given: dict[str, Any] = {"calib": [text], "settings": SETTINGS, "evaluate": False}
    compress(model, tmp_path / "same", ranks=tmp_path / "ranks.json", **given)
    plain = compress(model, tmp_path / "plain", keep=0.6, **given)
    assert sum(layer.rank or 0 for layer in plain.layers) < sum(layer["rank"] or 0 for layer in report["layers"])
    ours, theirs = open_checkpoint(packed), open_checkpoint(tmp_path / "same")
    assert set(ours.factors) == set(theirs.factors)
    for layer in report["layers"]:
        if layer["rank"] is None:
            continue
        products = [
            np.matmul(
                *(
                    each.store.read(core.tensor.name, "float64")
                    for core in each.factors[layer["name"]].branches[0].cores
                )
            )
            for each in (ours, theirs)
        ]
        error = np.linalg.norm(products[0] - products[1]) / np.linalg.norm(products[1])
        assert layer["stored_error"] == pytest.approx(error, rel=1e-3)


def test_it_exports_like_any_other(tmp_path: Path, packed: Path) -> None:
    from mixt_export import export

    result = export(packed, tmp_path / "out", target="ort")
    assert result.ok


def test_unknown_stores_and_broken_folders_are_refused(tmp_path: Path, text: Path, packed: Path) -> None:
    with pytest.raises(UsageError, match="remap8"):
        compress(tmp_path / "model", tmp_path / "x", store="int3", calib=[text], settings=SETTINGS)
    path = packed / "mixt_factors.json"
    good = json.loads(path.read_text())
    name = next(iter(good["packed"]))

    def broken(change: Any, error: type[Exception], words: str) -> None:
        described = json.loads(json.dumps(good))
        change(described)
        path.write_text(json.dumps(described))
        with pytest.raises(error, match=words) as caught:
            open_checkpoint(packed)
        assert "\n" not in str(caught.value)

    broken(lambda d: d.update(version=3), UnsupportedError, "up to version 2")
    broken(lambda d: d.update(version=1), CheckpointError, "unknown key 'packed'")
    broken(lambda d: d.pop("packed"), CheckpointError, "lacks the key 'packed'")
    broken(lambda d: d["packed"].pop(name), NetworkError, "which the model folder does not have")
    broken(lambda d: d["packed"][name].update(scheme="int4"), CheckpointError, "scheme 'remap8'")
    broken(lambda d: d["packed"][name].update(axis=2), CheckpointError, "axis 0 or 1")
    broken(lambda d: d["packed"][name].update(axis=1 - good["packed"][name]["axis"]), CheckpointError, name)
    path.write_text(json.dumps(good))
    tensors = load_file(packed / "model.safetensors")
    del tensors[f"{name}.scale"]
    save_file(tensors, packed / "model.safetensors")
    with pytest.raises(CheckpointError, match="is missing"):
        open_checkpoint(packed)
