"""Multiply-adds counted from a written graph: what is planned is what the nodes execute."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

from mixt_export.checkpoints import NewTensor, open_checkpoint, write_checkpoint
from mixt_export.cli.inspect import app
from mixt_export.inspection import inspect
from mixt_export.network import build, to_json
from mixt_export.targets import export, plan_export
from mixt_export.verification.work import graph_work
from tests.tiny import write_tiny, write_tiny_low_rank, write_tiny_mixt

ATTENTION = "model.layers.0.self_attn"


@pytest.fixture(scope="module")
def tensorllm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One block with the attention of LLaMA2-7B, its projections TensorLLM's Tucker factors of ranks (64, 4, 2)."""
    folder = tmp_path_factory.mktemp("tensorllm")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    config = json.loads((write_tiny(folder / "base", "llama", **sizes) / "config.json").read_text())
    heads = {"num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128}
    config |= {"hidden_size": 4096, "vocab_size": 64, **heads}
    linears = {
        f"{ATTENTION}.{kind}_proj": build.tucker_heads(
            f"{ATTENTION}.{kind}_proj", kind, 4096, 32, 128, (64, 4, 2), shared=f"{ATTENTION}.shared"
        )
        for kind in "qkvo"
    }
    rng = np.random.default_rng(0)
    shapes = {tensor.name: tensor.shape for linear in linears.values() for tensor in linear.tensors()}
    mlp = "model.layers.0.mlp"
    shapes |= {f"{mlp}.gate_proj.weight": (64, 4096), f"{mlp}.up_proj.weight": (64, 4096)}
    shapes |= {f"{mlp}.down_proj.weight": (4096, 64), "model.embed_tokens.weight": (64, 4096)}
    norms = ("model.norm", "model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm")
    shapes |= {f"{norm}.weight": (4096,) for norm in norms}
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (64, 4096)
    tensors = {name: rng.standard_normal(shape, np.float32) * 0.02 for name, shape in shapes.items()}
    model = folder / "model"
    model.mkdir()
    save_file(tensors, model / "model.safetensors", {"format": "mixt-factors"})
    (model / "config.json").write_text(json.dumps(config))
    described = {name: to_json(linear) for name, linear in linears.items()}
    text = {"format": "mixt-factors", "version": 1, "linears": described, "info": {}}
    (model / "mixt_factors.json").write_text(json.dumps(text))
    return model


def test_tensorllm_is_executed_as_it_is(tensorllm: Path, tmp_path: Path) -> None:
    """279 k parameters, 0.62 M multiply-adds for all four projections; the dense ones are 67.1 M of both."""
    export(tensorllm, tmp_path / "out", verify=False)
    report = inspect(tmp_path / "out")
    work = [node for node in report["work"] if "/self_attn/" in node["name"]]
    assert 0.61e6 <= sum(node["macs"] for node in work) < 0.625e6
    held = report["manifest"]["plan"]["elements"]
    assert held["stored"] == 4096 * 64 + 32 * 64 * 4 * 2 + 128 * 4 + 4 * 2 == 279_048
    assert held["planned"] < 2 * 279_048 and held["dense"] == 4 * 4096**2
    said = CliRunner().invoke(app, [str(tmp_path / "out")]).output
    assert "/model/layers.*/self_attn: 0.6" in said


def write_train(folder: Path, base: Path) -> Path:
    """``base`` with tensor trains of three cores for the up projections."""
    linears = {
        name: build.tensor_train(name, (4, 3, 4), (2, 4, 13), (5, 3))
        for name in open_checkpoint(base).store
        if name.endswith("up_proj.weight")
    }
    linears = {
        name.removesuffix(".weight"): replace(linear, name=name.removesuffix(".weight"))
        for name, linear in linears.items()
    }
    rng = np.random.default_rng(1)
    cores = {t.name: rng.standard_normal(t.shape).astype(np.float32) for m in linears.values() for t in m.tensors()}
    folder.mkdir()
    new = [NewTensor(name, "float32", core.shape, lambda core=core: core) for name, core in cores.items()]
    write_checkpoint(folder, open_checkpoint(base), new, linears, {})
    return folder


@pytest.mark.parametrize("target", ["ort", "onnx", "trt"])
@pytest.mark.parametrize("kind", ["low-rank", "mixt", "train"])
def test_the_graph_does_the_planned_work(tmp_path: Path, kind: str, target: str) -> None:
    base = write_tiny(tmp_path / "base", num_hidden_layers=2)
    writers = {"low-rank": write_tiny_low_rank, "mixt": lambda folder, base: write_tiny_mixt(folder, base, 3)}
    model = {**writers, "train": write_train}[kind](tmp_path / "model", base)
    forms = [] if kind == "low-rank" else [("up_proj", "chain" if kind == "train" else "pairs")]
    for einsum in (False, True):
        plan = plan_export(model, target=target, einsum=einsum, forms=forms)
        work = graph_work(ir.serde.serialize_model(plan.lowered.model))
        executed = {node.name.removesuffix("/MatMul"): node for node in work}
        for name, choice in plan.forms.choices.items():
            node = executed["/" + name.replace(".", "/").replace("layers/", "layers.")]
            assert node.macs == choice.form.macs, name
            assert einsum or node.transposes == choice.form.transposes
        operators = {node.op_type for function in plan.lowered.model.functions.values() for node in function}
        assert ("Einsum" in operators) == (einsum and kind != "mixt")
