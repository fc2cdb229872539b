"""Opening folders: which format it is, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mixt_export.checkpoints import open_checkpoint
from mixt_export.errors import CheckpointError, NetworkError, UnsupportedError
from tests.checkpoints.raw import write_folder
from tests.tiny import write_tiny, write_tiny_low_rank

LINEAR = "model.layers.1.mlp.up_proj"


def test_dense_folder(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(write_tiny(tmp_path, "mistral")))
    assert (checkpoint.format, checkpoint.reason) == ("huggingface", "model.safetensors beside config.json")
    assert checkpoint.config["model_type"] == "mistral"
    assert checkpoint.factors == {}
    assert checkpoint.info == {}


def test_companions(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path)
    for name in ("LICENSE", "Notice.txt", "chat_template.jinja", "README.md", "modeling_x.py", "merges.txt"):
        (folder / name).write_text(name)
    (folder / "licenses").mkdir()
    names = [path.name for path in open_checkpoint(folder).companions()]
    copied = (
        "LICENSE Notice.txt chat_template.jinja generation_config.json merges.txt tokenizer.json tokenizer_config.json"
    )
    assert sorted(names) == copied.split()


@pytest.mark.parametrize(
    ("files", "kind", "expected"),
    [
        ((), CheckpointError, "neither model.safetensors nor model.safetensors.index.json"),
        (
            ("pytorch_model.bin",),
            UnsupportedError,
            "no zip file as torch.save writes since .* safetensors",
        ),
        (("pytorch_model-00001-of-00002.bin",), CheckpointError, "without pytorch_model.bin.index.json; download"),
        (("consolidated.00.pth",), UnsupportedError, "pickled weights"),
        (("model.Q4.gguf",), UnsupportedError, "GGUF"),
        (("mixt_manifest.json",), CheckpointError, "exported folder; pass the model folder"),
    ],
)
def test_folders_of_other_kinds(tmp_path: Path, files: tuple[str, ...], kind: type[Exception], expected: str) -> None:
    folder = write_folder(tmp_path, None)
    for file in files:
        (folder / file).write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(kind, match=expected):
        open_checkpoint(folder)


def test_no_folder_and_a_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no such folder; pass the path of a local model folder"):
        open_checkpoint(tmp_path / "org" / "name")
    (tmp_path / "x").write_text("")
    with pytest.raises(CheckpointError, match="is a file; pass the model folder"):
        open_checkpoint(tmp_path / "x")


@pytest.mark.parametrize(
    ("text", "kind", "expected"),
    [
        (None, CheckpointError, "config.json: the file is missing; copy it"),
        (b"", CheckpointError, "is not valid JSON"),
        (b"[1]", CheckpointError, "must be a JSON object, not list"),
        (b'{"model_type": "llama", "model_type": "qwen2"}', CheckpointError, "'model_type' occurs twice"),
        (b'{"model_type": "llama", "rms_norm_eps": Infinity}', CheckpointError, "Infinity is not JSON"),
        (b"\xff\xfe{}", CheckpointError, "is not UTF-8"),
        (b'{"hidden_size": 8}', CheckpointError, "has no model_type"),
        (b" " * 10_000_001, CheckpointError, "more than the 10000000"),
        (
            b'{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}',
            UnsupportedError,
            "the weights are quantised .'gptq'.*start from",
        ),
    ],
)
def test_bad_config(tmp_path: Path, text: bytes | None, kind: type[Exception], expected: str) -> None:
    folder = write_tiny(tmp_path)
    (folder / "config.json").unlink()
    if text is not None:
        (folder / "config.json").write_bytes(text)
    with pytest.raises(kind, match=expected) as caught:
        open_checkpoint(folder)
    assert str(folder / "config.json") in str(caught.value)


@pytest.fixture
def factorised(tmp_path: Path) -> Path:
    return write_tiny_low_rank(tmp_path / "mixt", write_tiny(tmp_path / "dense"), {"up_proj": 5, "q_proj": 3})


def test_factorised_folder(factorised: Path) -> None:
    checkpoint = open_checkpoint(factorised)
    assert checkpoint.format == "mixt"
    assert len(checkpoint.factors) == 6
    assert checkpoint.factors[LINEAR].in_features == 48
    assert checkpoint.info["method"] == "random low rank"
    assert f"{LINEAR}.weight" not in checkpoint.store


def _branch(described: dict[str, Any]) -> dict[str, Any]:
    return described["linears"][LINEAR]["branches"][0]


Edit = Callable[[dict[str, Any]], Any]

BAD_FACTORS: dict[str, tuple[Edit, type[Exception], str]] = {
    "wrong format": (lambda d: d.update(format="other"), CheckpointError, "format must be 'mixt-factors', not 'other'"),
    "newer version": (lambda d: d.update(version=3), UnsupportedError, "version 3 of the format.*update mixt-export"),
    "version no number": (lambda d: d.update(version="1"), CheckpointError, "version must be a whole number"),
    "version true": (lambda d: d.update(version=True), CheckpointError, "version must be a whole number"),
    "unknown key": (lambda d: d.update(extra=1), CheckpointError, "has the unknown key 'extra'"),
    "missing key": (lambda d: d.pop("info"), CheckpointError, "lacks the key 'info'"),
    "linears no object": (lambda d: d.update(linears=[]), CheckpointError, "linears must be a JSON object"),
    "linear no object": (lambda d: d["linears"].update({LINEAR: 3}), NetworkError, "up_proj"),
    "unknown linear key": (lambda d: d["linears"][LINEAR].update(x=1), NetworkError, "has the unknown key 'x'"),
    "unknown branch key": (lambda d: _branch(d).update(x=1), NetworkError, "has the unknown key 'x'"),
    "tensor absent": (
        lambda d: _branch(d)["cores"][0].update(tensor="nowhere"),
        NetworkError,
        "names the tensor 'nowhere', which the model folder does not have",
    ),
    "wrong features": (lambda d: d["linears"][LINEAR].update(in_features=47), NetworkError, "47"),
    "wrong mode": (lambda d: _branch(d).update(in_modes=[["i", 12], ["j", 4]]), NetworkError, "up_proj"),
    "label too many": (
        lambda d: _branch(d)["cores"][0].update(labels=["i", "r", "s"]),
        NetworkError,
        r"model.layers.1.mlp.up_proj.core0",
    ),
    "swapped cores": (lambda d: _swap(d), NetworkError, "up_proj"),
}


def _swap(described: dict[str, Any]) -> None:
    first, second = _branch(described)["cores"]
    first["tensor"], second["tensor"] = second["tensor"], first["tensor"]


@pytest.mark.parametrize("case", BAD_FACTORS)
def test_bad_factors(factorised: Path, case: str) -> None:
    edit, kind, expected = BAD_FACTORS[case]
    path = factorised / "mixt_factors.json"
    described = json.loads(path.read_text())
    edit(described)
    path.write_text(json.dumps(described))
    with pytest.raises(kind, match=expected) as caught:
        open_checkpoint(factorised)
    assert type(caught.value) is kind
    assert str(caught.value).startswith(str(path))


def _resave(folder: Path, edit: Callable[[dict[str, np.ndarray]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_dense_weight_beside_its_factors(factorised: Path) -> None:
    _resave(factorised, lambda tensors: tensors.update({f"{LINEAR}.weight": np.zeros((104, 48), np.float32)}))
    with pytest.raises(
        CheckpointError, match=rf"'{LINEAR}' is factorised, but its dense weight .* is also in model.saf"
    ):
        open_checkpoint(factorised)


@pytest.mark.parametrize("shape", [(48, 4), (5, 48), (48, 5, 1), (240,)])
def test_factor_of_wrong_rank_or_shape(factorised: Path, shape: tuple[int, ...]) -> None:
    _resave(factorised, lambda tensors: tensors.update({f"{LINEAR}.core0": np.zeros(shape, np.float32)}))
    with pytest.raises(NetworkError, match=LINEAR) as caught:
        open_checkpoint(factorised)
    assert str(factorised / "mixt_factors.json") in str(caught.value)


def test_factor_of_wrong_dtype(factorised: Path) -> None:
    _resave(factorised, lambda tensors: tensors.update({f"{LINEAR}.core0": np.zeros((48, 5), np.int32)}))
    with pytest.raises(NetworkError, match=rf"{LINEAR}.*int32"):
        open_checkpoint(factorised)


def test_factors_without_weights(factorised: Path) -> None:
    (factorised / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"the file is missing; a model folder needs it or model.safetensors"):
        open_checkpoint(factorised)
