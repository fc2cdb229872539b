"""One graph with two forms of some linears: both branches against float64, and what says so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

from mixt_export.checkpoints import NewTensor, open_checkpoint, write_checkpoint
from mixt_export.network import FactorizedLinear, build, densify
from mixt_export.plan import FormPlan, forms_of
from mixt_export.targets import export, planning
from mixt_export.verification.memory.predict import predict_memory
from tests.ortrun import Graph, relative
from tests.tiny import write_tiny

UP, Q = "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"
SWITCH = 8


def linears() -> dict[str, FactorizedLinear]:
    train = build.with_sparse(build.tensor_train(UP, (6, 8), (8, 13), (5,), method="tt"), 40)
    return {UP: train, Q: build.tensor_train(Q, (4, 3, 4), (4, 4, 4), (4, 5), method="tt")}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with two trains, one with a residual, and beside it the same model dense."""
    base = write_tiny(tmp_path / "dense", num_hidden_layers=2)
    rng = np.random.default_rng(3)
    tensors = load_file(base / "model.safetensors")
    values: dict[str, np.ndarray] = {}
    for name, linear in linears().items():
        for ref in linear.tensors():
            if ref.dtype == "int64":
                size = linear.out_features if ref.name.endswith("rows") else linear.in_features
                values[ref.name] = rng.integers(0, size, ref.shape)
            else:
                values[ref.name] = (0.3 * rng.standard_normal(ref.shape)).astype(np.float32)
        tensors[f"{name}.weight"] = densify(linear, values.__getitem__).astype(np.float32)
    new = [
        NewTensor(ref.name, ref.dtype, ref.shape, lambda array=values[ref.name]: array)
        for linear in linears().values()
        for ref in linear.tensors()
    ]
    (tmp_path / "model").mkdir()
    write_checkpoint(tmp_path / "model", open_checkpoint(base), new, linears(), {})
    save_file(tensors, base / "model.safetensors")
    return tmp_path / "model"


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Second forms whatever they gain: stored cores for a few tokens, the matrix for many."""

    def chosen(plan: FormPlan, **_: object) -> FormPlan:
        few = {name: replace(choice, form=forms_of(choice.linear)[0]) for name, choice in plan.choices.items()}
        many = {name: replace(choice, form=forms_of(choice.linear)[-1]) for name, choice in plan.choices.items()}
        return replace(plan, choices=few, many=many, switch=SWITCH)

    monkeypatch.setattr(planning, "with_variants", chosen)


def logits(folder: Path, ids: np.ndarray, step: np.ndarray) -> Mapping[str, np.ndarray]:
    """Of a prompt, and of a step after it."""
    graph = Graph(folder)
    first, past = graph.run(ids)
    return {"many": first, "few": graph.run(step, past)[0]}


@pytest.mark.parametrize("target", ["ort", "onnx"])
@pytest.mark.usefixtures("always")
def test_both_branches_compute_the_linears(tmp_path: Path, model: Path, target: str) -> None:
    export(model, tmp_path / "out", target=target, verify=False)
    export(tmp_path / "dense", tmp_path / "reference", target=target, verify=False)
    rng = np.random.default_rng(4)
    for batch, seq in ((1, 9), (3, 5), (1, 3)):
        ids, step = rng.integers(0, 300, (batch, seq)), rng.integers(0, 300, (batch, 1))
        found, expected = (logits(tmp_path / name, ids, step) for name in ("out", "reference"))
        assert all(relative(found[part], expected[part]) < 1e-5 for part in expected)


@pytest.mark.usefixtures("always")
def test_the_number_of_tokens_decides(tmp_path: Path, model: Path) -> None:
    """With the weights of one branch spoilt, runs from SWITCH tokens on change and shorter ones do not."""
    export(model, tmp_path / "out", verify=False)
    proto = onnx.load_model(str(tmp_path / "out" / "model.onnx"), load_external_data=False)
    dense = next(tensor for tensor in proto.graph.initializer if tensor.name == f"{UP}.dense")
    place = {entry.key: entry.value for entry in dense.external_data}
    rng = np.random.default_rng(5)
    prompts = {shape: rng.integers(0, 300, shape) for shape in ((1, SWITCH - 1), (1, SWITCH), (2, 4), (SWITCH - 1, 1))}
    before = {shape: Graph(tmp_path / "out").run(ids)[0] for shape, ids in prompts.items()}
    with (tmp_path / "out" / place["location"]).open("r+b") as file:
        file.seek(int(place["offset"]))
        file.write(bytes(int(place["length"])))
    for shape, ids in prompts.items():
        changed = not np.array_equal(Graph(tmp_path / "out").run(ids)[0], before[shape])
        assert changed == (shape[0] * shape[1] >= SWITCH), shape


@pytest.mark.usefixtures("always")
def test_verified_counted_and_told(tmp_path: Path, model: Path) -> None:
    result = export(model, tmp_path / "out", verify=True)
    assert result.ok
    proto = onnx.load_model(str(tmp_path / "out" / "model.onnx"), load_external_data=False)
    assert [node.name for node in proto.graph.node if node.op_type == "If"] == [
        "/model/layers.0/mlp/up_proj",
        "/model/layers.1/self_attn/q_proj",
    ]
    plan = result.manifest["plan"]
    assert plan["switch"] == SWITCH
    assert {name: entry["many"] for name, entry in plan["forms"].items()} == {UP: "dense", Q: "dense"}
    cores = sum(ref.size for linear in linears().values() for ref in linear.core_tensors()) + 40
    assert plan["elements"]["planned"] == cores + 48 * 104 + 48 * 64
    few, many = (predict_memory(proto, seq=seq, total=20).activations for seq in (1, 20))
    assert 0 < few < many


@pytest.mark.usefixtures("always")
def test_none_is_one_form(tmp_path: Path, model: Path) -> None:
    result = export(model, tmp_path / "out", variants="none", verify=False)
    assert "switch" not in result.manifest["plan"]
    proto = onnx.load_model(str(tmp_path / "out" / "model.onnx"), load_external_data=False)
    assert not any(node.op_type == "If" for node in proto.graph.node)
