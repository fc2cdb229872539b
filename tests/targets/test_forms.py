"""Executable forms of MixT linears in an export: chosen, declared, guarded."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from mixt_export.checkpoints import open_checkpoint
from mixt_export.cli.export import app
from mixt_export.errors import MixtError, UnsupportedError, UsageError
from mixt_export.inspection import inspect
from mixt_export.lower import factors_of, lower_decoder
from mixt_export.plan import choose_forms
from mixt_export.targets import export, plan_export
from mixt_export.verification.checks import redensified
from mixt_export.verification.graph import open_graph
from mixt_export.verification.memory.weights import checkpoint_size, merged_elements
from tests.tiny import write_tiny, write_tiny_low_rank, write_tiny_mixt


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One block of 128 x 2048: large enough that a dense matrix cannot hide in the slack of the checks."""
    folder = tmp_path_factory.mktemp("forms")
    sizes = {"hidden_size": 128, "intermediate_size": 2048, "num_hidden_layers": 1}
    return write_tiny_mixt(folder / "model", write_tiny(folder / "base", **sizes), 4)


@pytest.mark.parametrize("objective", ["balanced", "memory"])
def test_the_manifest_declares_what_the_graph_holds(tmp_path: Path, model: Path, objective: str) -> None:
    export(model, tmp_path / "out", optimize_for=objective, forms=[("up_proj", "pairs")], verify=False)
    manifest = json.loads((tmp_path / "out" / "mixt_manifest.json").read_text())
    plan = manifest["plan"]
    assert plan["optimize_for"] == objective and plan["device"] == "cpu" and len(plan["forms"]) == 7
    up = plan["forms"]["model.layers.0.mlp.up_proj"]
    assert up["form"] == "pairs" and up["windows"] == [2, 2] and "asked for by --form" in up["reason"]
    assert manifest["linears"]["model.layers.0.mlp.up_proj"]["form"] == "MixTLinear2"
    graph = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False)
    held = sum(np.prod(tensor.dims) for tensor in graph.graph.initializer if "_proj." in tensor.name)
    assert plan["elements"]["planned"] == held == sum(form["elements"] for form in plan["forms"].values())
    stored = load_file(model / "model.safetensors")
    assert plan["elements"]["stored"] == sum(core.size for name, core in stored.items() if ".core" in name)
    assert plan["elements"]["dense"] == 3 * 128 * 2048 + 2 * 128 * 64 + 2 * 128 * 32
    assert inspect(tmp_path / "out")["manifest"]["plan"] == plan


def test_weights_are_merged_in_float64_and_rounded_once(tmp_path: Path, model: Path) -> None:
    export(model, tmp_path / "out", dtype="fp16", forms=[(".", "pairs")], verify=False)
    held = {t.name: t for t in onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph.initializer}
    name = "model.layers.0.mlp.down_proj"
    stored = load_file(model / "model.safetensors")
    first, second = (stored[f"{name}.branch{k}.core0"].astype(np.float64) for k in (2, 3))
    expected = (np.kron(first, np.eye(2)) + np.kron(np.eye(2), second)).T / 4
    found = numpy_helper.to_array(held[f"{name}.terms2_3"], str(tmp_path / "out"))
    np.testing.assert_array_equal(found, expected.astype(np.float16))


def test_values_that_do_not_fit_are_refused(tmp_path: Path, model: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    for k in range(4):
        tensors[f"model.layers.0.mlp.up_proj.branch{k}.core0"][0, 0] = 9e4
    save_file(tensors, folder / "model.safetensors", {"format": "mixt-factors"})
    with pytest.raises(UnsupportedError, match=r"up_proj.* do not fit float16 .*choose a wider dtype"):
        export(folder, tmp_path / "out", dtype="fp16", forms=[("up_proj", "dense")], verify=False)
    assert not (tmp_path / "out").exists()


def test_a_lowering_that_rebuilds_dense_weights_is_caught(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lower_dense(decoder, checkpoint, dialect, *, plan, **options):
        dense = choose_forms(factors_of(decoder, checkpoint), overrides=[(".", "dense")])
        return lower_decoder(decoder, checkpoint, dialect, plan=dense, **options)

    assert plan_export(model, forms=[(".", "dense")]).weight_bytes > plan_export(model).weight_bytes
    monkeypatch.setattr(sys.modules["mixt_export.targets.export"], "lower_decoder", lower_dense)
    with pytest.raises(MixtError, match="the lowering rebuilt dense weights"):
        plan_export(model, optimize_for="memory")


def run_check(exported: Path, model: Path) -> object:
    graph = open_graph(exported)
    manifest = json.loads((exported / "mixt_manifest.json").read_text())
    options = SimpleNamespace(threads=1)
    return redensified.run(
        SimpleNamespace(close=lambda: None, graph=graph, reference=model, options=options, manifest=manifest)
    )


def test_the_check_of_an_export_knows_the_plan_and_nothing_more(tmp_path: Path, model: Path) -> None:
    export(model, tmp_path / "pairs", forms=[(".", "pairs")], verify=False)
    result = run_check(tmp_path / "pairs", model)
    assert result.passed, result.reason
    assert result.metrics["merged_constants"] == result.metrics["planned_constants"] - _stored(model)
    export(model, tmp_path / "dense", forms=[(".", "dense")], verify=False)
    assert run_check(tmp_path / "dense", model).passed
    path = tmp_path / "dense" / "mixt_manifest.json"
    manifest = json.loads(path.read_text())
    undeclared = {name: form | {"form": "branches"} for name, form in manifest["plan"]["forms"].items()}
    unknown = {name: form | {"form": "denser"} for name, form in manifest["plan"]["forms"].items()}
    for plan in ({"forms": undeclared}, {"forms": unknown}, {"forms": {"a": 1}}, {"forms": 3}, None):
        path.write_text(json.dumps(manifest | {"plan": plan}))
        result = run_check(tmp_path / "dense", model)
        assert not result.passed and "the graph holds" in result.reason


def test_a_manifest_declares_forms_and_not_their_sizes(tmp_path: Path, model: Path) -> None:
    export(model, tmp_path / "out", verify=False)
    path = tmp_path / "out" / "mixt_manifest.json"
    manifest = json.loads(path.read_text())
    honest = run_check(tmp_path / "out", model).metrics["planned_constants"]
    manifest["plan"]["elements"] = {"stored": 0, "planned": 10**12, "dense": 10**12}
    for form in manifest["plan"]["forms"].values():
        form["elements"] = 10**12
    path.write_text(json.dumps(manifest))
    assert run_check(tmp_path / "out", model).metrics["planned_constants"] == honest
    low = write_tiny_low_rank(tmp_path / "low", write_tiny(tmp_path / "base"))
    assert merged_elements(low, 3, {}) == merged_elements(low, 3, {".": "dense"}) == 0
    every = dict.fromkeys(open_checkpoint(model).factors, "dense")
    size = checkpoint_size(model, 1)
    assert merged_elements(model, 1, every) == size.dense_elements - size.elements


def _stored(model: Path) -> int:
    return sum(tensor.size for tensor in load_file(model / "model.safetensors").values())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"optimize_for": "speed"}, "--optimize-for speed"),
        ({"forms": [("q_proj", "fast")]}, "--form q_proj=fast: .* has no such form; it has branches"),
        ({"forms": [("w_proj", "pairs")]}, "no factorised linear of the model matches"),
    ],
)
def test_bad_options(tmp_path: Path, model: Path, options: dict, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        export(model, tmp_path / "out", verify=False, **options)


def test_the_command_line(model: Path) -> None:
    runner = CliRunner()
    said = runner.invoke(app, [str(model), "--dry-run", "--optimize-for", "memory", "--form", "(k|v)_proj=dense"])
    assert said.exit_code == 0, said.output
    assert "factorised linears, optimised for memory on cpu" in said.output
    assert "mixt 128→32: dense × 2 (k_proj, v_proj), 4,096 MACs, 0 transposes: asked for by --form" in said.output
    refused = runner.invoke(app, [str(model), "--dry-run", "--form", "pairs"])
    assert isinstance(refused.exception, UsageError) and "write REGEX=FORM" in str(refused.exception)
