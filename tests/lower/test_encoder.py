"""Encoder graphs against transformers: alone, padded, with segments, at float32 and float16, dense and factorised."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import transformers

from mixt_export.checkpoints import NewTensor, open_checkpoint, write_checkpoint
from mixt_export.network import FactorizedLinear, build, densify
from mixt_export.targets import export
from tests.ortrun import relative
from tests.tiny_encoder import write_tiny_encoder

torch.set_num_threads(1)
KINDS = [("bert", False), ("bert", True), ("roberta", False), ("roberta", True), ("distilbert", True)]


def session(folder: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(folder / "model.onnx", options)


def theirs(folder: Path, ids: np.ndarray, mask: np.ndarray, **more: np.ndarray) -> np.ndarray:
    model: Any = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    given = {name: torch.from_numpy(value) for name, value in more.items()}
    with torch.no_grad():
        out = model(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), **given)
    states: np.ndarray = out.last_hidden_state.numpy()
    return states


def ragged(pad: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Three sequences of 11, 4 and 7 tokens, padded on the right."""
    rng = np.random.default_rng(seed)
    ids, mask = np.full((3, 11), pad, np.int64), np.zeros((3, 11), np.int64)
    for row, length in enumerate((11, 4, 7)):
        ids[row, :length], mask[row, :length] = rng.integers(5, 300, length), 1
    return ids, mask


def fed(ids: np.ndarray, mask: np.ndarray, graph: ort.InferenceSession, **more: np.ndarray) -> dict[str, np.ndarray]:
    feeds = {"input_ids": ids, "attention_mask": mask, **more}
    if any(found.name == "token_type_ids" for found in graph.get_inputs()):
        feeds.setdefault("token_type_ids", np.zeros_like(ids))
    names = [output.name for output in graph.get_outputs()]
    return dict(zip(names, graph.run(None, feeds), strict=True))


@pytest.mark.parametrize("target", ["ort", "onnx"])
@pytest.mark.parametrize(("kind", "task"), KINDS)
def test_states_and_embeddings_are_those_of_transformers(tmp_path: Path, kind: str, task: bool, target: str) -> None:
    model = write_tiny_encoder(tmp_path / "model", kind, task=task)
    export(model, tmp_path / "out", target=target, verify=False)
    graph = session(tmp_path / "out")
    ids, mask = ragged(pad=1 if kind == "roberta" else 0)
    wanted, found = theirs(model, ids, mask), fed(ids, mask, graph)
    for row in range(len(ids)):
        length = int(mask[row].sum())
        assert relative(found["last_hidden_state"][row, :length], wanted[row, :length]) < 1e-5
        mean = wanted[row, :length].astype(np.float64).mean(axis=0)
        assert relative(found["sentence_embedding"][row], mean / np.linalg.norm(mean)) < 1e-5


def test_the_second_segment_has_embeddings_of_its_own(tmp_path: Path) -> None:
    model = write_tiny_encoder(tmp_path / "model")
    export(model, tmp_path / "out", verify=False)
    ids, mask = np.arange(5, 17, dtype=np.int64)[None], np.ones((1, 12), np.int64)
    segments = (np.arange(12) > 5).astype(np.int64)[None]
    wanted = theirs(model, ids, mask, token_type_ids=segments)
    found = fed(ids, mask, session(tmp_path / "out"), token_type_ids=segments)["last_hidden_state"]
    assert relative(found, wanted) < 1e-5
    assert relative(fed(ids, mask, session(tmp_path / "out"))["last_hidden_state"], wanted) > 1e-2


def test_left_padding_counts_positions_as_transformers_does(tmp_path: Path) -> None:
    model = write_tiny_encoder(tmp_path / "model", "roberta")
    export(model, tmp_path / "out", verify=False)
    ids, mask = ragged(pad=1)
    ids, mask = ids[:, ::-1].copy(), mask[:, ::-1].copy()
    wanted, found = theirs(model, ids, mask), fed(ids, mask, session(tmp_path / "out"))["last_hidden_state"]
    assert relative(found[mask == 1], wanted[mask == 1]) < 1e-5


@pytest.mark.parametrize("activation", ["gelu_new", "gelu_pytorch_tanh", "relu"])
def test_other_activations(tmp_path: Path, activation: str) -> None:
    model = write_tiny_encoder(tmp_path / "model", hidden_act=activation)
    export(model, tmp_path / "out", verify=False)
    ids, mask = ragged(pad=0)
    wanted, found = theirs(model, ids, mask), fed(ids, mask, session(tmp_path / "out"))["last_hidden_state"]
    assert relative(found[mask == 1], wanted[mask == 1]) < 1e-5


def test_float16_loses_what_the_dtype_costs(tmp_path: Path) -> None:
    model = write_tiny_encoder(tmp_path / "model")
    export(model, tmp_path / "out", dtype="fp16", verify=False)
    ids, mask = ragged(pad=0)
    found = fed(ids, mask, session(tmp_path / "out"))["last_hidden_state"]
    assert found.dtype == np.float32
    assert 1e-5 < relative(found[mask == 1], theirs(model, ids, mask)[mask == 1]) < 5e-3


def test_num_layers_cuts_the_model(tmp_path: Path) -> None:
    model = write_tiny_encoder(tmp_path / "model")
    export(model, tmp_path / "out", num_layers=2, verify=False)
    ids, mask = ragged(pad=0)
    cut: Any = transformers.AutoModel.from_pretrained(model, num_hidden_layers=2, attn_implementation="eager").eval()
    with torch.no_grad():
        wanted = cut(torch.from_numpy(ids), torch.from_numpy(mask)).last_hidden_state.numpy()
    found = fed(ids, mask, session(tmp_path / "out"))["last_hidden_state"]
    assert relative(found[mask == 1], wanted[mask == 1]) < 1e-5


QUERY = "encoder.layer.1.attention.self.query"
UP, DOWN = "encoder.layer.0.intermediate.dense", "encoder.layer.2.output.dense"
FACTORS: dict[str, tuple[str, Callable[[str], FactorizedLinear]]] = {
    "low-rank": (QUERY, lambda name: build.low_rank(name, 48, 48, 6, bias=True)),
    "mixt": (UP, lambda name: build.mixt(name, 48, 104, 3, bias=True)),
    "tensor-train": (UP, lambda name: build.tensor_train(name, (4, 3, 4), (2, 4, 13), (5, 3), bias=True)),
    "tucker": (DOWN, lambda name: build.tucker2(name, 104, 48, 9, 7, bias=True)),
}


@pytest.mark.parametrize("structure", FACTORS)
def test_factors_give_what_their_dense_matrix_gives(tmp_path: Path, structure: str) -> None:
    base = write_tiny_encoder(tmp_path / "base")
    name, make = FACTORS[structure]
    linear = make(name)
    rng = np.random.default_rng(3)
    cores = {t.name: (rng.standard_normal(t.shape) / t.shape[-1] ** 0.5).astype(np.float32) for t in linear.tensors()}
    new = [NewTensor(key, "float32", core.shape, lambda core=core: core) for key, core in cores.items()]
    (tmp_path / "model").mkdir()
    write_checkpoint(tmp_path / "model", open_checkpoint(base), new, {name: linear}, {})
    export(tmp_path / "model", tmp_path / "out", verify=False)

    dense: Any = transformers.AutoModel.from_pretrained(base, attn_implementation="eager").eval()
    module = dense.get_submodule(name)
    with torch.no_grad():
        module.weight.copy_(torch.from_numpy(densify(linear, cores.__getitem__)))
        assert linear.bias is not None
        module.bias.copy_(torch.from_numpy(cores[linear.bias.name]))
    ids, mask = ragged(pad=0)
    with torch.no_grad():
        wanted = dense(torch.from_numpy(ids), torch.from_numpy(mask)).last_hidden_state.numpy()
    found = fed(ids, mask, session(tmp_path / "out"))["last_hidden_state"]
    assert relative(found[mask == 1], wanted[mask == 1]) < 1e-5


def test_weights_are_pointed_at_where_they_lie(tmp_path: Path) -> None:
    model = write_tiny_encoder(tmp_path / "model")
    export(model, tmp_path / "out", target="ort", verify=False)
    graph = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False)
    outside = {entry.value for t in graph.graph.initializer for entry in t.external_data if entry.key == "location"}
    assert outside == {"model.safetensors"}
