"""What the runtime says to a folder that is not whole, and what it may import."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest

from mixt_export.errors import UnsupportedError
from mixt_export.resources import resource
from mixt_export.runtime import load_runtime
from tests.runtimes.conftest import Tiny

#: What the device side may import beyond the standard library; the last two only for text.
ALLOWED = {"numpy", "onnxruntime", "mixt_ort", "tokenizers", "jinja2"}


def imported(source: str) -> set[str]:
    """Top-level names of every import statement, nested ones included; "" for a relative one."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("" if node.level else (node.module or "").split(".")[0])
    return names


def test_runtimes_import_nothing_else() -> None:
    files = sorted((resource("runtimes") / "ort").rglob("*.py"))
    assert {"mixt_ort.py", "run.py"} <= {path.name for path in files}
    for path in files:
        foreign = imported(path.read_text(encoding="utf-8")) - ALLOWED - set(sys.stdlib_module_names)
        assert not foreign, f"{path} imports {foreign}"


def test_import_check_sees_nested_imports() -> None:
    assert imported("def f():\n    import torch.nn\nfrom mixt_export import x\nfrom . import y") == {
        "torch",
        "mixt_export",
        "",
    }


def test_runtime_is_loaded_once_and_only_if_known(rt: ModuleType) -> None:
    assert load_runtime() is rt
    with pytest.raises(UnsupportedError, match="no runtime 'abacus'; known: ort"):
        load_runtime("abacus")


def test_token_ids_need_no_text_packages(tiny: Tiny) -> None:
    """Tokens in, tokens out must work where only numpy and onnxruntime are installed."""
    code = (
        "import sys; sys.modules.update(tokenizers=None, jinja2=None, torch=None, transformers=None)\n"
        f"sys.path.insert(0, {str(resource('runtimes') / 'ort')!r})\n"
        "import mixt_ort\n"
        f"print(list(mixt_ort.Model({str(tiny.folder)!r}, threads=1).generate([1, 2, 3], 4)))\n"
        f"try: mixt_ort.Tokenizer({str(tiny.folder)!r})\n"
        "except mixt_ort.FolderError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    tokens, message = run.stdout.splitlines()
    assert json.loads(tokens) == list(tiny.model.generate([1, 2, 3], 4))
    assert "pip install tokenizers" in message


def test_device_script(tiny: Tiny) -> None:
    script = resource("runtimes") / "ort" / "run.py"

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
        environment.pop("PYTHONPATH", None)
        return subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, env=environment)

    good = run(str(tiny.folder), "-p", "ab", "--max-tokens", "5", "--chat", "--threads", "1")
    assert good.returncode == 0, good.stderr
    assert "decode" in good.stderr
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    plain = [sys.executable, script, str(tiny.folder), "-p", "ab", "--temperature", "3", "--seed", "1"]
    ascii_only = subprocess.run(plain, capture_output=True, env=environment, check=True)
    assert ascii_only.stdout.isascii()
    bad = run(str(tiny.folder / "none"), "-p", "ab")
    assert bad.returncode == 2
    assert bad.stderr.startswith("error: ")
    assert bad.stderr.count("\n") == 1


@pytest.fixture
def folder(tiny: Tiny, tmp_path: Path) -> Path:
    target = tmp_path / "copy"
    shutil.copytree(tiny.folder, target)
    return target


def change(folder: Path, name: str, value: Any) -> None:
    """Set a dotted manifest field; None of type ``type`` removes it."""
    path = folder / "mixt_manifest.json"
    data = json.loads(path.read_text())
    *parents, last = name.split(".")
    target = data
    for part in parents:
        target = target[part]
    if value is type:
        del target[last]
    else:
        target[last] = value
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("schema", 2, "schema 2 is not 1"),
        ("schema", type, "schema None is not 1"),
        ("dialect", "trt", "dialect is 'trt', expected one of ort, portable"),
        ("dialect", ["ort"], "dialect is"),
        ("padding", "middle", "padding is 'middle'"),
        ("dtype", "int4", "dtype is 'int4'"),
        ("kv", type, "'kv.shared_buffer' is missing"),
        ("kv", 3, "'kv.shared_buffer' is missing"),
        ("kv.shared_buffer", 1, "expected true or false"),
        ("kv.heads", 0, "kv.heads is 0"),
        ("kv.heads", True, "kv.heads is True"),
        ("kv.layers", 10**9, "kv.layers is 1000000000"),
        ("kv.head_dim", "16", "kv.head_dim is '16'"),
        ("kv.dtype", "float8", "kv.dtype is 'float8'"),
        ("limits.max_seq_len", -1, "limits.max_seq_len is -1"),
        ("limits", type, "'limits.max_seq_len' is missing"),
        ("vocab_size", 1.5, "vocab_size is 1.5"),
        ("eos_token_ids", 257, "eos_token_ids is 257"),
        ("eos_token_ids", [-1], "eos_token_ids is .-1."),
        ("bos_token_id", "<s>", "bos_token_id is '<s>'"),
        ("bos_token_id", type, "'bos_token_id' is missing"),
    ],
)
def test_wrong_manifest(rt: ModuleType, folder: Path, name: str, value: Any, text: str) -> None:
    change(folder, name, value)
    with pytest.raises(rt.FolderError, match=text) as caught:
        rt.Model(folder)
    assert "mixt_manifest.json" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "text"),
    [(b"{", "not valid JSON"), (b"[]", "holds list"), (b"\xff", "not UTF-8"), (b"[" * 100_000, "not valid JSON")],
)
def test_corrupt_manifest(rt: ModuleType, folder: Path, content: bytes, text: str) -> None:
    (folder / "mixt_manifest.json").write_bytes(content)
    with pytest.raises(rt.FolderError, match=text):
        rt.Model(folder)


def test_huge_manifest_is_not_read(rt: ModuleType, folder: Path) -> None:
    with (folder / "mixt_manifest.json").open("r+b") as file:
        file.truncate(2**33)
    with pytest.raises(rt.FolderError, match="larger than"):
        rt.Model(folder)


@pytest.mark.parametrize("name", ["model.onnx", "mixt_manifest.json"])
def test_missing_file(rt: ModuleType, folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(rt.FolderError, match=f"{name}: no such file"):
        rt.Model(folder)


def test_truncated_model(rt: ModuleType, folder: Path) -> None:
    path = folder / "model.onnx"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(rt.FolderError, match=r"model\.onnx: ONNX Runtime cannot load it"):
        rt.Model(folder)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("kv.layers", 1, "'past_key_values.1.key' does not fit"),
        ("kv.layers", 3, "'past_key_values.2.key' does not fit"),
        ("kv.heads", 3, "'past_key_values.0.key' is tensor"),
        ("kv.head_dim", 8, "'past_key_values.0.key' is tensor"),
        ("kv.dtype", "float16", "'past_key_values.0.key' is tensor"),
        ("vocab_size", 300, "'logits' is tensor"),
    ],
)
def test_manifest_against_graph(rt: ModuleType, folder: Path, name: str, value: Any, text: str) -> None:
    """Buffers are bound by address with the manifest's sizes, so the graph must agree before anything runs."""
    change(folder, name, value)
    with pytest.raises(rt.FolderError, match=text):
        rt.Model(folder)


def test_logits_of_every_position_are_refused(rt: ModuleType, folder: Path) -> None:
    model = onnx.load(folder / "model.onnx")
    next(node for node in model.graph.node if node.output[0] == "logits").output[0] = "one"
    model.graph.node.append(onnx.helper.make_node("Concat", ["one", "one"], ["logits"], axis=1))
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 2
    onnx.save(model, folder / "model.onnx")
    with pytest.raises(rt.FolderError, match="output 'logits' is tensor"):
        rt.Model(folder)


def test_fp16_cache_is_half_the_size(rt: ModuleType, tiny: Tiny) -> None:
    manifest = rt.read_manifest(tiny.folder)
    assert manifest.kv_bytes_per_token == 2 * 2 * 2 * 16 * 4
    assert np.dtype(rt._KV_DTYPES["float16"]).itemsize == 2


def test_machine_facts(rt: ModuleType) -> None:
    assert 1 <= rt.physical_cores() <= (os.cpu_count() or 1)
    before = rt.peak_rss_bytes()
    block = np.ones(30_000_000)
    assert rt.peak_rss_bytes() >= before
    assert rt.peak_rss_bytes() >= block.nbytes


@pytest.mark.parametrize("name", ["model.onnx", "mixt_manifest.json"])
def test_links_stay_in_the_folder(rt: ModuleType, folder: Path, tmp_path: Path, name: str) -> None:
    """One that leads out is refused; one within, or from a snapshot of the Hugging Face cache to its blobs, is not."""
    outside = tmp_path / "elsewhere"
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    with pytest.raises(rt.FolderError, match="leads out of the folder"):
        rt.Model(folder)
    (folder / name).unlink()
    outside.rename(folder / "within")
    (folder / name).symlink_to("within")
    rt.Model(folder)
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "blobs").mkdir()
    snapshot = folder.rename(tmp_path / "snapshots" / "main")
    (snapshot / "within").rename(tmp_path / "blobs" / "0")
    (snapshot / name).unlink()
    (snapshot / name).symlink_to("../../blobs/0")
    rt.Model(snapshot)
