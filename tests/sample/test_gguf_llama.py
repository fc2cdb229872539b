"""The GGUF reader: row order of q and k, dequantisation, refusal of other files."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from mixt_export.errors import CheckpointError
from mixt_export.sample import gguf_llama
from mixt_export.sample.gguf_llama import GgufLlama, Source, unpermute_rows
from tests.sample import tiny


def rotate_pairs(x: np.ndarray, position: int) -> np.ndarray:
    """Rotary embedding of llama.cpp's Llama: neighbours (2i, 2i + 1) form a pair. x: (heads, head_dim)."""
    out = np.empty_like(x)
    for i in range(x.shape[1] // 2):
        angle = position * 10000.0 ** (-2 * i / x.shape[1])
        a, b = x[:, 2 * i], x[:, 2 * i + 1]
        out[:, 2 * i], out[:, 2 * i + 1] = a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)
    return out


def rotate_halves(x: np.ndarray, position: int) -> np.ndarray:
    """Rotary embedding of transformers: (i, i + head_dim/2) form a pair."""
    half = x.shape[1] // 2
    out = np.empty_like(x)
    for i in range(half):
        angle = position * 10000.0 ** (-2 * i / x.shape[1])
        a, b = x[:, i], x[:, i + half]
        out[:, i], out[:, i + half] = a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)
    return out


@pytest.mark.parametrize(("heads", "head_dim", "hidden"), [(1, 2, 3), (3, 10, 7), (9, 64, 5)])
def test_attention_scores_survive_the_change_of_row_order(heads: int, head_dim: int, hidden: int) -> None:
    rng = np.random.default_rng(heads)
    stored_q, stored_k = rng.standard_normal((2, heads * head_dim, hidden)).astype("f4")
    x, y = rng.standard_normal((2, hidden))
    q, k = unpermute_rows(stored_q, heads), unpermute_rows(stored_k, heads)

    def scores(q: np.ndarray, k: np.ndarray, rotate) -> np.ndarray:
        one = rotate((q.astype("f8") @ x).reshape(heads, head_dim), 11)
        two = rotate((k.astype("f8") @ y).reshape(heads, head_dim), 4)
        return (one * two).sum(axis=1)

    expected = scores(stored_q, stored_k, rotate_pairs)
    np.testing.assert_allclose(scores(q, k, rotate_halves), expected, rtol=1e-12, atol=1e-12)
    if head_dim > 2:  # a head of two rows has one pair in either order
        assert not np.allclose(scores(stored_q, stored_k, rotate_halves), expected)


@pytest.mark.parametrize(("heads", "head_dim"), [(1, 2), (4, 8), (5, 6)])
def test_unpermutation_undoes_the_interleaving(heads: int, head_dim: int) -> None:
    weight = np.random.default_rng(0).standard_normal((heads * head_dim, 3)).astype("f4")
    np.testing.assert_array_equal(unpermute_rows(tiny.interleave(weight, heads), heads), weight)


@pytest.fixture
def tiny_gguf(tmp_path: Path) -> Path:
    tiny.write_gguf(tmp_path / "tiny.gguf", tiny.random_weights(1))
    return tmp_path / "tiny.gguf"


def test_every_tensor_comes_back_under_its_name(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_llama, "_ROWS", 7)  # several pieces per matrix, the last one short
    model = GgufLlama(tiny_gguf)
    weights = tiny.random_weights(1)
    sources = model.sources()
    assert {source.name for source in sources} == weights.keys()
    for source in sources:
        assert model.shape(source) == weights[source.name].shape
        np.testing.assert_array_equal(np.concatenate(list(model.pieces(source))), weights[source.name])


def test_quantised_blocks(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    scale, low = rng.uniform(0.01, 1, (2, 6, 2)).astype("f2")
    codes = rng.integers(0, 16, (6, 2, 32), dtype=np.uint8)
    packed = codes[..., :16] | codes[..., 16:] << 4  # Q4_1: byte j holds values j and j + 16
    rows = np.concatenate([scale[..., None].view("u1"), low[..., None].view("u1"), packed], axis=2).reshape(6, 40)
    values = codes * scale[..., None].astype("f8") + low[..., None].astype("f8")
    path = tmp_path / "q.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("w", rows, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (piece,) = GgufLlama(path).pieces(Source("w", "w"))
    assert piece.dtype == np.float32
    np.testing.assert_allclose(piece, values.reshape(6, 64), rtol=1e-6)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    weights = tiny.random_weights(1)
    del weights["model.layers.1.mlp.up_proj.weight"]
    tiny.write_gguf(tmp_path / "tiny.gguf", weights)
    with pytest.raises(CheckpointError, match=r"blk\.1\.ffn_up\.weight"):
        GgufLlama(tmp_path / "tiny.gguf").sources()


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a gguf file at all" * 9])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"not a readable GGUF"):
        GgufLlama(tmp_path / "bad.gguf")
