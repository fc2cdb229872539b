"""Forms of any network in an export: executed, guarded, held within a budget, visible."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from mixt_export.checkpoints import NewTensor, open_checkpoint, write_checkpoint
from mixt_export.cli.export import app
from mixt_export.cli.inspect import app as inspect_app
from mixt_export.errors import MixtError, ResourceError, UsageError
from mixt_export.lower import factors_of, lower_decoder
from mixt_export.network import FactorizedLinear, build, densify
from mixt_export.plan import choose_forms, forms_of
from mixt_export.targets import export, plan_export
from mixt_export.targets.planning import parse_bytes
from mixt_export.verification.checks import redensified
from mixt_export.verification.graph import open_graph
from tests.ortrun import Graph, relative
from tests.tiny import write_tiny

UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"  # 128 -> 2048 -> 128
VALUE = "model.layers.0.self_attn.v_proj"  # 128 -> 32
SIZES = {"hidden_size": 128, "intermediate_size": 2048, "num_hidden_layers": 1}


def linears() -> dict[str, FactorizedLinear]:
    """A train and a Kronecker sum, stored otherwise than products read them, and factors stored as they are read."""
    return {
        UP: build.tensor_train(UP, (4, 4, 2, 4), (8, 8, 4, 8), (12, 12, 12)),
        DOWN: build.kronecker(DOWN, (32, 64), (8, 16), 3),
        VALUE: build.tucker2(VALUE, 128, 32, 24, 16),
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("networks")
    base = write_tiny(folder / "dense", **SIZES)
    factors = linears()
    rng = np.random.default_rng(11)
    cores = {
        t.name: (rng.standard_normal(t.shape) / t.shape[-1] ** 0.5).astype(np.float32)
        for linear in factors.values()
        for t in linear.tensors()
    }
    (folder / "model").mkdir()
    new = [NewTensor(name, "float32", core.shape, lambda core=core: core) for name, core in cores.items()]
    write_checkpoint(folder / "model", open_checkpoint(base), new, factors, {})
    tensors = load_file(base / "model.safetensors")
    for name, linear in factors.items():
        tensors[f"{name}.weight"] = densify(linear, cores.__getitem__).astype(np.float32)
    save_file(tensors, base / "model.safetensors")
    return folder / "model"


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    folder = tmp_path_factory.mktemp("expected")
    export(model.parent / "dense", folder / "out", verify=False)
    return Graph(folder / "out").run(IDS)[0]


IDS = np.random.default_rng(12).integers(0, 300, (2, 9))


@pytest.mark.parametrize("target", ["ort", "onnx"])
@pytest.mark.parametrize("einsum", [False, True], ids=["products", "einsum"])
def test_every_form_computes_the_model(
    tmp_path: Path, model: Path, expected: np.ndarray, target: str, einsum: bool
) -> None:
    names = [form.name for form in forms_of(linears()[UP])]
    assert {"chain", "dense"} < set(names) and any(name.startswith("merged") for name in names)
    for number, name in enumerate(names if target == "ort" else names[:3]):
        out = tmp_path / str(number)
        result = export(model, out, target=target, forms=[("up_proj", name)], einsum=einsum, verify=False)
        assert relative(Graph(out).run(IDS)[0], expected) < 1e-5, name
        assert result.manifest["plan"]["forms"][UP]["form"] == name


def test_cores_are_stored_as_products_read_them(tmp_path: Path, model: Path) -> None:
    """No node works on a constant, and what is stored in the right order is pointed at where it lies."""
    export(model, tmp_path / "out", forms=[("up_proj", "chain"), ("down_proj|v_proj", "chain")], verify=False)
    graph = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False)
    for function in graph.functions:
        cores = set(function.input) - {"x"}
        assert all(node.op_type == "MatMul" for node in function.node if cores & set(node.input))
    external = [tensor for tensor in graph.graph.initializer if tensor.external_data]
    places = {t.name: next(e.value for e in t.external_data if e.key == "location") for t in external}
    assert {places[f"{VALUE}.core{index}"] for index in range(3)} == {"model.safetensors"}
    assert {place for name, place in places.items() if name.startswith((UP, DOWN))} == {"model.onnx.data"}


def check(exported: Path, model: Path) -> object:
    graph = open_graph(exported)
    manifest = json.loads((exported / "mixt_manifest.json").read_text())
    options = SimpleNamespace(threads=1)
    return redensified.run(
        SimpleNamespace(close=lambda: None, graph=graph, reference=model, options=options, manifest=manifest)
    )


@pytest.mark.parametrize("form", ["chain", "dense"])
def test_onnxruntime_keeps_the_factors_apart(tmp_path: Path, model: Path, form: str) -> None:
    export(model, tmp_path / "out", forms=[(".", form)], verify=False)
    result = check(tmp_path / "out", model)
    assert result.passed, result.reason
    assert (result.metrics["merged_constants"] > 0) == (form == "dense")
    dense = tmp_path / "rebuilt"
    export(model, dense, forms=[(".", "dense")], verify=False)
    (dense / "mixt_manifest.json").write_text((tmp_path / "out" / "mixt_manifest.json").read_text())
    assert check(dense, model).passed == (form == "dense")


def test_a_lowering_that_rebuilds_dense_weights_is_caught(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """512 kB beyond the plan, which the slack for masks would hide: factors are held against their own plan."""

    def lower_dense(decoder, checkpoint, dialect, *, plan, **options):
        dense = choose_forms(factors_of(decoder, checkpoint), overrides=[("up_proj", "merged:1-2,3-4")])
        return lower_decoder(decoder, checkpoint, dialect, plan=dense, **options)

    monkeypatch.setattr(sys.modules["mixt_export.targets.export"], "lower_decoder", lower_dense)
    with pytest.raises(MixtError, match=r"bytes of factors, planned were .* the lowering rebuilt dense weights"):
        plan_export(model, forms=[("up_proj", "chain")])


def test_a_memory_budget(tmp_path: Path, model: Path) -> None:
    small, large = (plan_export(model, optimize_for=name, variants="none") for name in ("memory", "balanced"))
    assert small.weight_bytes < large.weight_bytes
    between = (small.weight_bytes + large.weight_bytes) // 2
    plan = plan_export(model, memory_budget=between, variants="none")
    assert small.weight_bytes <= plan.weight_bytes <= between
    plenty = plan_export(model, memory_budget=10**9, variants="none")
    assert all(min(choice.gains.values()) > 0.95 for choice in plenty.forms.choices.values())
    with pytest.raises(ResourceError, match="--memory-budget: the weights need at least"):
        plan_export(model, memory_budget=small.weight_bytes // 2)


def test_the_command_line(tmp_path: Path, model: Path) -> None:
    runner = CliRunner()
    said = runner.invoke(app, [str(model), "--dry-run", "--memory-budget", "3MB", "--einsum"])
    assert said.exit_code == 0, said.output
    assert "factorised linears, optimised for balanced on cpu" in said.output
    refused = runner.invoke(app, [str(model), "--dry-run", "--memory-budget", "100kB"])
    assert isinstance(refused.exception, ResourceError)
    export(model, tmp_path / "out", forms=[("up_proj", "dense")], verify=False)
    for folder, words in ((model, ("kronecker 2048→128",)), (tmp_path / "out", ("up_proj × 1: 262,144 (MatMul)",))):
        shown = runner.invoke(inspect_app, [str(folder)])
        assert shown.exit_code == 0, shown.output
        for word in ("factorised linears, optimised for balanced on cpu", *words):
            assert word in shown.output, shown.output


@pytest.mark.parametrize(
    ("text", "nbytes"), [("1000", 1000), ("1.5GiB", 3 << 29), ("400 MB", 400_000_000), ("2kb", 2000), ("3KiB", 3072)]
)
def test_sizes(text: str, nbytes: int) -> None:
    assert parse_bytes(text, "--memory-budget") == nbytes


@pytest.mark.parametrize("text", ["", "MB", "-3MB", "1e3", "4 bits", "0", "0.4B", "9" * 400, "9" * 30 + "GB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match=r"--memory-budget .*is no size; write a number with a unit"):
        parse_bytes(text, "--memory-budget")
