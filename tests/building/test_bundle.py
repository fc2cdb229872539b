"""OUT/device of an export for TensorRT, and the golden tensors in it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from mixt_export.building import record_golden, write_bundle
from mixt_export.errors import UsageError
from mixt_export.targets import export
from mixt_export.targets.trt import TrtOptions
from tests.ortrun import Graph, relative
from tests.tiny import write_tiny, write_tiny_mixt


def export_trt(folder: Path, jetpack: int = 6, *, verify: bool = False) -> tuple[Path, Path]:
    base = write_tiny(folder / "base", num_hidden_layers=3)
    model = write_tiny_mixt(folder / "model", base)
    options = TrtOptions(jetpack=jetpack, max_input_len=16, max_batch=2)
    export(model, folder / "out", target="trt", num_layers=2, max_seq_len=100, verify=verify, trt=options)
    return model, folder / "out"


def test_what_a_board_gets(tmp_path: Path) -> None:
    _, out = export_trt(tmp_path)
    device = out / "device"
    names = {path.name for path in device.iterdir()}
    assert names == {
        "Dockerfile", "README.md", "build_engine.py", "check_parity.py", "mixt_ort.py", "mixt_trt", "run.py",
        "trtexec.sh",
    }  # fmt: skip
    assert (device / "mixt_trt" / "__init__.py").is_file() and not list(device.rglob("__pycache__"))
    assert not (device / "golden").exists()  # recorded only when the export is verified


@pytest.mark.parametrize(("jetpack", "strong"), [(6, True), (7, True)])
def test_the_trtexec_script_is_that_of_this_export(tmp_path: Path, jetpack: int, strong: bool) -> None:
    """TensorRT 10.16 of JetPack 7.2 still needs --stronglyTyped, though its dialect is called trt11."""
    _, out = export_trt(tmp_path, jetpack)
    path = out / "device" / "trtexec.sh"
    text = path.read_text()
    assert path.stat().st_mode & 0o111 and subprocess.run(["sh", "-n", path], check=False).returncode == 0
    assert ("--stronglyTyped" in text) == strong and "--onnx=model.onnx" in text
    for name in ("input_ids:2x16", "past_key_values.1.value:2x2x99x16"):
        assert name in text.partition("--maxShapes=")[2]


def test_a_folder_for_another_target_gets_no_bundle(tmp_path: Path) -> None:
    export(write_tiny(tmp_path / "m", num_hidden_layers=1), tmp_path / "out", target="onnx", verify=False)
    with pytest.raises(UsageError, match="was exported for target 'onnx'"):
        write_bundle(tmp_path / "out")


@pytest.mark.parametrize("tokenizer", [True, False])
def test_golden_tensors_are_what_another_lowering_computes(tmp_path: Path, tokenizer: bool) -> None:
    """PyTorch's record against the portable dialect in ONNX Runtime, which shares no graph with the export."""
    model, out = export_trt(tmp_path)
    if not tokenizer:
        (out / "tokenizer.json").unlink()
    golden = out / "device" / "golden"
    record_golden(model, out, golden)
    export(model, tmp_path / "portable", target="onnx", num_layers=2, max_seq_len=100, verify=False)
    graph = Graph(tmp_path / "portable")
    facts = json.loads((golden / "golden.json").read_text())
    assert facts["reference"] == "PyTorch float32" and len(facts["cases"]) == 3
    assert facts["tolerance"] == {"logits": 1e-4, "norms": 1e-4}
    for case in facts["cases"]:
        logits, cache, hidden = (
            np.load(golden / f"{case['name']}.{what}.npy") for what in ("logits", "cache", "hidden")
        )
        tokens = np.array([case["tokens"]])
        rows, past = [], None
        for start, end in [(0, case["prompt"]), *((i, i + 1) for i in range(case["prompt"], tokens.shape[1]))]:
            row, past = graph.run(tokens[:, start:end], past)
            rows.append(row[0])
        assert relative(np.stack(rows), logits) < 1e-5
        assert past is not None
        norms = np.stack([np.sqrt((part[0].astype(np.float64) ** 2).sum(axis=(0, 2))) for part in past])
        assert relative(norms.reshape(2, 2, -1), cache) < 1e-5
        assert hidden.shape == (2, tokens.shape[1]) and (hidden > 0).all()
        # Six tokens after the prompt are PyTorch's own.
        assert list(np.stack(rows)[:-1].argmax(axis=1)) == case["tokens"][case["prompt"] :]


@pytest.mark.parametrize("length", [2, 5])
def test_golden_tensors_fit_a_short_export(tmp_path: Path, length: int) -> None:
    model = write_tiny(tmp_path / "model", num_hidden_layers=1)
    export(model, tmp_path / "out", target="trt", max_seq_len=length, verify=False)
    record_golden(model, tmp_path / "out", tmp_path / "golden")
    for case in json.loads((tmp_path / "golden" / "golden.json").read_text())["cases"]:
        assert len(case["tokens"]) == length and 0 < case["prompt"] < length


def test_a_verified_export_carries_golden_tensors(tmp_path: Path) -> None:
    _, out = export_trt(tmp_path, verify=True)
    facts = json.loads((out / "device" / "golden" / "golden.json").read_text())
    manifest = json.loads((out / "mixt_manifest.json").read_text())
    assert facts["graph"] == manifest["files"]["model.onnx"]["sha256"]
