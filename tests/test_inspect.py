"""mixt inspect: counts against numpy, both kinds of folder, both outputs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from mixt_export.checkpoints import NewTensor, open_checkpoint, write_checkpoint
from mixt_export.cli.export import app as export_app
from mixt_export.cli.inspect import app
from mixt_export.errors import CheckpointError
from mixt_export.inspection import inspect, kv_bytes_per_token
from mixt_export.network import build
from tests.checkpoints import raw
from tests.tiny import tiny_tensors, write_tiny, write_tiny_low_rank
from tests.tiny_encoder import write_tiny_encoder


def printed(folder: Path, *options: str) -> str:
    result = CliRunner(env={"COLUMNS": "120"}).invoke(app, [str(folder), *options], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


@pytest.mark.parametrize("tied", [True, False])
def test_dense_counts(tmp_path: Path, tied: bool) -> None:
    folder = write_tiny(tmp_path, "qwen2", tied=tied, dtype="bfloat16", shards=2)
    report = inspect(folder)
    tensors = tiny_tensors(json.loads((folder / "config.json").read_text()))
    matrices = {name: value.size for name, value in tensors.items() if ".layers." in name and value.ndim == 2}
    assert (report["kind"], report["format"], report["model_type"]) == ("model", "huggingface", "qwen2")
    assert report["tied_embeddings"] is tied
    assert report["params"] == {
        "total": sum(value.size for value in tensors.values()),
        "embeddings": 300 * 48 * (1 if tied else 2),
        "linears": sum(matrices.values()),
        "other": sum(value.size for value in tensors.values() if value.ndim == 1),
        "dense_linears": sum(matrices.values()),
    }
    assert report["bytes"] == 2 * report["params"]["total"]
    assert report["bytes_by_dtype"] == {"bfloat16": report["bytes"]}
    assert list(report["types"]) == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    keys = 3 * 48 * 32
    assert report["types"]["k_proj"] == {"count": 3, "factorised": 0, "params": keys, "dense_params": keys}
    assert len(report["linears"]) == 21
    assert report["kv_bytes_per_token"] == {"float32": 3 * 2 * 2 * 16 * 4, "float16": 3 * 2 * 2 * 16 * 2}


def test_factorised_counts(tmp_path: Path) -> None:
    folder = write_tiny_low_rank(tmp_path / "m", write_tiny(tmp_path / "d", "qwen3"), {"up_proj": 9, "v_proj": 5})
    report = inspect(folder)
    up = next(entry for entry in report["linears"] if entry["name"] == "model.layers.2.mlp.up_proj")
    assert up == {
        "name": "model.layers.2.mlp.up_proj",
        "layer": 2,
        "type": "up_proj",
        "shape": [104, 48],
        "factorised": True,
        "method": "low_rank",
        "ranks": [[9]],
        "params": 9 * (48 + 104),
        "dense_params": 48 * 104,
        "share": 9 * (48 + 104) / (48 * 104),
    }
    value = report["types"]["v_proj"]
    assert value == {"count": 3, "factorised": 3, "params": 3 * 5 * (48 + 32), "dense_params": 3 * 48 * 32}
    params = report["params"]
    saved = 3 * (48 * 104 - 9 * 152) + 3 * (48 * 32 - 5 * 80)
    assert params["dense_linears"] - params["linears"] == saved
    stored = sum(tensor.ref.size for tensor in open_checkpoint(folder).store.values())
    assert params["total"] == stored == params["embeddings"] + params["linears"] + params["other"]
    assert report["kv_bytes_per_token"]["float16"] == 3 * 2 * 2 * 16 * 2


def test_shared_and_sparse_tensors_count_once(tmp_path: Path) -> None:
    base = open_checkpoint(write_tiny(tmp_path / "d", num_hidden_layers=2))
    names = [f"model.layers.{layer}.mlp.gate_proj" for layer in (0, 1)]
    basis = "model.layers.0.mlp.basis"
    factors = {name: build.low_rank(name, 48, 104, 4, names=[basis, f"{name}.core1"]) for name in names}
    sparse = build.with_sparse(build.mixt("model.layers.0.mlp.up_proj", 48, 104, 3), 6)
    factors[sparse.name] = sparse
    refs = {ref for linear in factors.values() for ref in linear.tensors()}
    new = [NewTensor(ref.name, ref.dtype, ref.shape, lambda ref=ref: np.zeros(ref.shape, ref.dtype)) for ref in refs]
    (tmp_path / "m").mkdir()
    write_checkpoint(tmp_path / "m", base, new, factors, {})
    report = inspect(tmp_path / "m")
    assert report["types"]["gate_proj"]["params"] == 4 * 48 + 2 * 4 * 104
    assert report["types"]["up_proj"]["params"] == 3 * 12 * 26 + 6 + 48 * 104
    assert report["params"]["linears"] == sum(kind["params"] for kind in report["types"].values())
    assert "mixt" in printed(tmp_path / "m")


def test_printed_tables(tmp_path: Path) -> None:
    folder = write_tiny_low_rank(
        tmp_path / "m", write_tiny(tmp_path / "d"), {"up_proj": 9, "model.layers.1.mlp.gate_proj": 3}
    )
    text = printed(folder)
    for part in ("mixt_factors.json beside config.json", "llama", "float32", "tied to the head", "info.method"):
        assert part in text
    rows = [line.split() for line in text.splitlines()]
    assert ["up_proj", "3", "3", "4,104", "27.4", "%"] in rows
    assert ["r", "9"] in rows
    assert [row[0] for row in rows if row[1:] and row[1:3] == ["dense", "dense"]] == ["0", "1", "2"]


def test_equal_layers_are_one_row(tmp_path: Path) -> None:
    text = printed(write_tiny(tmp_path, num_hidden_layers=12))
    assert any(line.split()[:2] == ["0–11", "dense"] for line in text.splitlines())


def test_json_output(tmp_path: Path) -> None:
    folder = write_tiny_low_rank(tmp_path / "m", write_tiny(tmp_path / "d"), 4)
    assert json.loads(printed(folder, "--json")) == inspect(folder)


def test_exported_folder(tmp_path: Path) -> None:
    manifest: dict[str, Any] = {
        "version": 1,
        "target": "ort",
        "model": {"dtype": "float16", "layers": 3},
        "shape": [1, 2],
        "files": [{"name": "model.onnx"}],
    }
    (tmp_path / "mixt_manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "device").mkdir()
    (tmp_path / "device" / "run.py").write_bytes(bytes(2000))
    report = inspect(tmp_path)
    assert report["kind"] == "export"
    assert report["manifest"] == manifest
    assert report["files"]["device/run.py"] == 2000
    size = f"{sum(report['files'].values()) / 1000:.2f}"
    rows = [line.split() for line in printed(tmp_path).splitlines()]
    for row in (
        ["target", "ort"],
        ["model.dtype", "float16"],
        ["shape", "1,", "2"],
        ["files", "1", "entries"],
        ["Folder", "2", "files,", size, "KB"],
    ):
        assert row in rows
    (tmp_path / "mixt_manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"mixt_manifest.json: is not valid JSON"):
        inspect(tmp_path)


def test_control_characters_do_not_reach_the_terminal(tmp_path: Path) -> None:
    text = printed(write_tiny(tmp_path, model_type="llama", architectures=["x"]))
    assert "\x1b[2J" not in text
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_type"] = "evil\x1b[2J[red]"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "evil�[2J[red]" in printed(tmp_path)


def test_control_characters_of_a_method_neither(tmp_path: Path) -> None:
    """The plan's lines say it, of a folder that inspect reads and of one that is about to be exported."""
    folder = write_tiny_low_rank(tmp_path / "out", write_tiny(tmp_path / "base"))
    description = json.loads((folder / "mixt_factors.json").read_text())
    for linear in description["linears"].values():
        linear["method"] = "evil\x1b[2J"
    (folder / "mixt_factors.json").write_text(json.dumps(description))
    exported = CliRunner().invoke(export_app, [str(folder), "--dry-run"], catch_exceptions=False)
    for text in (printed(folder), exported.stdout):
        assert "evil�[2J" in text and "\x1b[2J" not in text


def test_keys_that_other_families_call_otherwise(tmp_path: Path) -> None:
    """GPT-2 says n_layer, n_head and n_embd; an encoder has no cache, and no head that its embeddings could be."""
    gpt2 = inspect(write_tiny(tmp_path / "gpt2", "gpt2"))
    config = json.loads((tmp_path / "gpt2" / "config.json").read_text())
    assert gpt2["kv_bytes_per_token"]["float16"] == config["n_layer"] * 2 * config["n_embd"] * 2
    bert = inspect(write_tiny_encoder(tmp_path / "bert"))
    assert bert["kv_bytes_per_token"] == {} and not bert["tied_embeddings"]
    assert bert["params"]["embeddings"] == (300 + 64 + 2) * 48
    text = printed(tmp_path / "bert")
    assert "an encoder has no cache" in text and "tied to the head" not in text


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64}, 2 * 2 * 4 * 16 * 4),
        ({"num_hidden_layers": 2, "num_key_value_heads": 1, "head_dim": 24}, 2 * 2 * 1 * 24 * 4),
        ({"num_hidden_layers": 2, "num_attention_heads": 0, "hidden_size": 64}, None),
        ({"num_hidden_layers": "2", "num_attention_heads": 4, "hidden_size": 64}, None),
        ({}, None),
    ],
)
def test_kv_bytes(config: dict[str, Any], expected: int | None) -> None:
    found = kv_bytes_per_token(config)
    assert (None if found is None else found["float32"]) == expected


def test_headers_only_and_no_torch(tmp_path: Path) -> None:
    """The weights of a sparse 8 GB file are not read, and neither torch nor transformers is imported."""
    folder = write_tiny(tmp_path, num_hidden_layers=1)
    size = 2_000_000_000
    header = {"model.embed_tokens.weight": raw.tensor("F32", [size // 1000, 1000], 0, 4 * size)}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 4 * size)
    code = (
        "import sys; from pathlib import Path; from mixt_export.inspection import inspect; "
        "import mixt_export.cli.inspect; assert inspect(Path(sys.argv[1]))['params']['total'] == 2_000_000_000; "
        "assert not {'torch', 'transformers', 'onnx', 'onnxruntime'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, cwd=Path(__file__).parent.parent, timeout=20)
