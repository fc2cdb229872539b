"""An exported folder: what it holds, that it appears whole or not at all, that inputs stay as they are."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mixt_export.staging as staging
from mixt_export.errors import CheckpointError, ResourceError, UnsupportedError, UsageError
from mixt_export.targets import export, plan_export
from tests.tiny import write_tiny, write_tiny_low_rank


def snapshot(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "model", num_hidden_layers=2)


def test_the_folder_holds_what_the_design_promises(tmp_path: Path, model: Path) -> None:
    before = snapshot(model)
    result = export(model, tmp_path / "out", verify=False)
    out = tmp_path / "out"
    names = {path.name for path in out.iterdir()}
    assert {"model.onnx", "model.onnx.data", "model.safetensors", "config.json", "genai_config.json"} <= names
    assert {
        "mixt_manifest.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "device",
    } <= names
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (model / name).read_bytes()
    assert (out / "model.safetensors").samefile(model / "model.safetensors") and result.linked
    assert snapshot(model) == before
    manifest = json.loads((out / "mixt_manifest.json").read_text())
    assert manifest == result.manifest
    for name, facts in manifest["files"].items():
        data = (out / name).read_bytes()
        assert facts == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert manifest["kv"] == {"layers": 2, "heads": 2, "head_dim": 16, "dtype": "float32", "shared_buffer": True}
    assert manifest["memory"]["kv_bytes_per_token"] == 2 * 2 * 2 * 16 * 4
    assert result.ok and not list(tmp_path.glob(".out*"))


def test_weight_bytes_are_those_of_the_tensors(tmp_path: Path, model: Path) -> None:
    stored = sum(tensor.nbytes for tensor in load_file(model / "model.safetensors").values())
    tables = 2 * 256 * 8 * 4
    assert 0 <= plan_export(model).weight_bytes - stored - tables < 200  # the small constants
    low_rank = write_tiny_low_rank(tmp_path / "low", model, ranks=4)
    smaller = sum(tensor.nbytes for tensor in load_file(low_rank / "model.safetensors").values())
    assert smaller < stored
    assert 0 <= plan_export(low_rank).weight_bytes - smaller - tables < 200


def test_weights_are_copied_where_links_cannot_be_made(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(staging.os, "link", refuse)
    result = export(model, tmp_path / "out", verify=False)
    assert not result.linked
    assert not (tmp_path / "out/model.safetensors").samefile(model / "model.safetensors")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()


def test_an_occupied_output_is_kept(tmp_path: Path, model: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="not empty; pass --overwrite"):
        export(model, out, verify=False)
    with pytest.raises(UsageError, match="holds files this tool did not write"):
        export(model, out, verify=False, overwrite=True)
    assert snapshot(out) == {"thesis.txt": hashlib.sha256(b"years of work").hexdigest()}


def test_overwrite_replaces_our_own_folder_whole(tmp_path: Path, model: Path) -> None:
    export(model, tmp_path / "out", verify=False)
    export(model, tmp_path / "out", target="onnx", dtype="fp16", verify=False, overwrite=True)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "genai_config.json" not in names and "model.safetensors" not in names and "model.onnx" in names


@pytest.mark.parametrize("output", ["model", "."])
def test_the_output_may_not_swallow_the_input(tmp_path: Path, model: Path, output: str) -> None:
    with pytest.raises(UsageError, match="is or contains the input"):
        export(model, tmp_path / output, verify=False, overwrite=True)
    assert model.is_dir()


def test_a_failed_export_leaves_nothing_and_the_old_one_stays(tmp_path: Path, model: Path) -> None:
    export(model, tmp_path / "out", verify=False)
    before = snapshot(tmp_path / "out")
    broken = write_tiny(tmp_path / "broken", num_hidden_layers=2)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model.layers.1.mlp.up_proj.weight"):
        export(broken, tmp_path / "out", verify=False, overwrite=True)
    assert snapshot(tmp_path / "out") == before
    assert not list(tmp_path.glob(".out*"))


def test_no_space(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(ResourceError, match=r"needs .* MB in .*only 0.0 MB are free"):
        export(model, tmp_path / "out", verify=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"target": "tflite"}, UsageError, "--target tflite"),
        ({"dtype": "int3"}, UsageError, "--dtype int3"),
        ({"max_seq_len": 100000}, UsageError, "--max-seq-len 100000: the model knows positions 1 to 256"),
        ({"num_layers": 9}, UsageError, "--num-layers 9"),
    ],
)
def test_bad_options(tmp_path: Path, model: Path, options: dict[str, object], error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        export(model, tmp_path / "out", verify=False, **options)
    assert not (tmp_path / "out").exists()


def test_an_unknown_model_type_is_unsupported(tmp_path: Path, model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    with pytest.raises(UnsupportedError, match="model_type 'mamba' is not supported"):
        export(model, tmp_path / "out", verify=False)


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGINT])
def test_killed_at_any_moment_the_output_is_absent_or_whole(tmp_path: Path, kind: signal.Signals) -> None:
    model = write_tiny(tmp_path / "model", vocab_size=40000, num_hidden_layers=3)  # large enough to be caught writing
    command = [
        sys.executable,
        "-m",
        "mixt_export.cli",
        "export",
        str(model),
        "--no-verify",
        "--target",
        "onnx",
        "--fp16",
    ]
    states = set()
    for attempt in range(6):
        out = tmp_path / f"out{attempt}"
        process = subprocess.Popen([*command, "-o", str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 30
        while (
            process.poll() is None and time.monotonic() < deadline and not list(tmp_path.glob(f".out{attempt}.tmp-*"))
        ):
            time.sleep(0.002)
        time.sleep(0.004 * attempt)
        process.send_signal(kind)
        _, said = process.communicate(timeout=60)
        states.add(out.exists())
        if out.exists():
            assert (out / "mixt_manifest.json").is_file() and (out / "model.onnx").is_file()
        if kind == signal.SIGINT:
            assert not list(tmp_path.glob(f".out{attempt}.tmp-*"))
            if process.returncode:
                assert process.returncode == 130 and said.decode().count("\n") == 1
    assert False in states, "never interrupted in time; the test says nothing"
    assert os.listdir(model)
