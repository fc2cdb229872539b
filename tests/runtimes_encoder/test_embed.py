"""The encoder's device side: embeddings from a copied folder, order, batches, bad input."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from typer.testing import CliRunner

from mixt_export.cli.embed import app
from mixt_export.errors import UsageError
from mixt_export.runtime import load_runtime
from mixt_export.targets import export
from tests.tiny_encoder import write_tiny_encoder

TEXTS = ["alpha", "a somewhat longer sentence than the first", "b", "mid length text"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_encoder(tmp_path_factory.mktemp("embed") / "model", "roberta")


@pytest.fixture(scope="module")
def out(model: Path) -> Path:
    export(model, model.parent / "out", verify=False)
    return model.parent / "out"


def reference(model: Path, ids: list[int]) -> np.ndarray:
    torch_model: Any = transformers.AutoModel.from_pretrained(model, attn_implementation="eager").eval()
    with torch.no_grad():
        mean = torch_model(torch.tensor([ids])).last_hidden_state[0].double().mean(0).numpy()
    unit: np.ndarray = mean / np.linalg.norm(mean)
    return unit


def test_embeddings_keep_the_order_of_the_texts(model: Path, out: Path) -> None:
    runtime = load_runtime("ort_encoder")
    encoder = runtime.Encoder(out, threads=1)
    found = encoder.embed(TEXTS * 5)  # more than one batch
    assert found.shape == (20, 48)
    assert found.dtype == np.float32
    for text, vector in zip(TEXTS, found, strict=False):
        assert np.abs(vector - reference(model, encoder.tokenize(text))).max() < 1e-5
    assert np.abs(found[:4] - found[16:]).max() < 1e-6
    assert encoder.embed([]).shape == (0, 48)


def test_states_are_of_every_token(out: Path) -> None:
    encoder = load_runtime("ort_encoder").Encoder(out)
    assert encoder.states([5, 6, 7]).shape == (3, 48)


def test_long_texts_are_cut_and_long_ids_refused(out: Path) -> None:
    runtime = load_runtime("ort_encoder")
    encoder = runtime.Encoder(out)
    assert len(encoder.tokenize("x" * 500)) == encoder.max_length
    with pytest.raises(runtime.EncoderError, match="text 0: has 500 tokens; the model takes 1 to 62"):
        encoder.embed_ids([[5] * 500])
    with pytest.raises(runtime.EncoderError, match="text 1: has 0 tokens"):
        encoder.embed_ids([[5], []])


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("mixt_manifest.json", None, "no such file"),
        ("mixt_manifest.json", "{", "is not JSON"),
        ("mixt_manifest.json", '{"schema": 1}', "does not describe an encoder"),
        ("mixt_manifest.json", '{"schema": 1, "kind": "encoder", "limits": 3, "model": {}}', "limits is missing"),
        ("mixt_manifest.json", '{"schema": 1, "kind": "encoder", "limits": {}, "model": {}}', "not a count"),
        ("model.onnx", "junk", "onnxruntime refuses it"),
        ("model.onnx", None, "no such file"),
        ("tokenizer.json", "{", "is not a tokenizer"),
        ("tokenizer.json", None, "no such file"),
    ],
)
def test_a_broken_folder_is_one_sentence(
    out: Path, tmp_path: Path, file: str, content: str | None, message: str
) -> None:
    runtime = load_runtime("ort_encoder")
    shutil.copytree(out, tmp_path / "broken")
    path = tmp_path / "broken" / file
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(runtime.EncoderError, match=message):
        runtime.Encoder(tmp_path / "broken").embed(["x"])


def test_the_script_that_travels_with_the_model(model: Path, out: Path) -> None:
    done = subprocess.run(
        [sys.executable, "device/embed.py", ".", *TEXTS[:2]], cwd=out, capture_output=True, text=True, check=True
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["text"] for line in lines] == TEXTS[:2]
    encoder = load_runtime("ort_encoder").Encoder(out)
    assert np.abs(np.array(lines[0]["embedding"]) - reference(model, encoder.tokenize("alpha"))).max() < 1e-5
    bad = subprocess.run([sys.executable, "device/embed.py", "absent", "x"], cwd=out, capture_output=True, text=True)
    assert bad.returncode == 2
    assert bad.stderr.startswith("error: absent")


def test_the_verb(out: Path) -> None:
    done = CliRunner().invoke(app, [str(out), "one", "two"])
    assert done.exit_code == 0
    vectors = [json.loads(line)["embedding"] for line in done.stdout.splitlines()]
    cosine = float(np.dot(*vectors))
    pairs = CliRunner().invoke(app, [str(out), "--similarity", "one", "two"])
    assert float(pairs.stdout.split()[0]) == pytest.approx(cosine, abs=1e-4)
    alone = CliRunner().invoke(app, [str(out), "--similarity", "one"])
    assert isinstance(alone.exception, UsageError) and "give two or more" in str(alone.exception)
    broken = CliRunner().invoke(app, [str(out), "one", "tw\udcff"])
    assert isinstance(broken.exception, UsageError) and "sentence 2 is not UTF-8" in str(broken.exception)
    piped = CliRunner().invoke(app, [str(out)], input="one\n\ntwo\n")
    assert piped.stdout == done.stdout


@pytest.mark.parametrize("name", ["mixt_manifest.json", "model.onnx", "tokenizer.json"])
def test_links_out_of_the_folder_are_refused(out: Path, tmp_path: Path, name: str) -> None:
    runtime = load_runtime("ort_encoder")
    folder = Path(shutil.copytree(out, tmp_path / "folder"))
    (folder / name).rename(folder / "within")
    (folder / name).symlink_to("within")
    runtime.Encoder(folder).embed(["x"])
    (folder / "within").rename(tmp_path / "elsewhere")
    (folder / name).unlink()
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(runtime.EncoderError, match="leads out of the folder"):
        runtime.Encoder(folder).embed(["x"])
