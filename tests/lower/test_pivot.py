"""The form pivot as nodes: through onnxruntime against float64 products of the stored factors, and in whole exports."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import numpy_helper
from safetensors.numpy import load_file

from mixt_export.checkpoints import NewTensor, open_checkpoint, write_checkpoint
from mixt_export.errors import UnsupportedError, UsageError
from mixt_export.inspection import inspect
from mixt_export.lower import pivot as lowering
from mixt_export.lower.builder import GraphBuilder
from mixt_export.lower.dialects import DIALECTS, check_dialect
from mixt_export.lower.factors import lower_form
from mixt_export.lower.linear import LinearContext
from mixt_export.lower.weights import DTYPES, Weights, write_streamed
from mixt_export.network import FactorizedLinear, SparseResidual, TensorRef, build
from mixt_export.plan import named_forms
from mixt_export.plan.pivot import pivots
from mixt_export.targets import export
from tests.ortrun import relative
from tests.tiny import write_tiny, write_tiny_low_rank

UP = "model.layers.0.mlp.up_proj"
IN, OUT = 48, 104


def stored(
    folder: Path, rank: int, *, bias: bool = False, sparse: bool = False, spread: float = 1.0
) -> FactorizedLinear:
    """A model folder whose up projection has two factors, singular values of the second from 1 to 1/``spread``."""
    rng = np.random.default_rng(rank)
    linear = build.low_rank(UP, IN, OUT, rank)
    left, values, right = np.linalg.svd(rng.standard_normal((rank, OUT)), full_matrices=False)
    up = (left * np.geomspace(1.0, 1.0 / spread, len(values))) @ right
    arrays = {f"{UP}.core0": rng.standard_normal((IN, rank)), f"{UP}.core1": up}
    if bias:
        linear = replace(linear, bias=TensorRef(f"{UP}.bias", (OUT,), "float32"))
        arrays[f"{UP}.bias"] = rng.standard_normal(OUT)
    if sparse:
        refs = [
            TensorRef(f"{UP}.{side}", (9,), kind)
            for side, kind in zip("rcv", ("int64", "int64", "float32"), strict=True)
        ]
        linear = replace(linear, sparse=SparseResidual(*refs))
        arrays |= {f"{UP}.r": rng.integers(0, OUT, 9), f"{UP}.c": rng.integers(0, IN, 9), f"{UP}.v": np.ones(9)}
    new = [
        NewTensor(t.name, t.dtype, t.shape, lambda a=arrays[t.name], d=t.dtype: a.astype(d)) for t in linear.tensors()
    ]
    folder.mkdir()
    write_checkpoint(
        folder, open_checkpoint(write_tiny(folder.parent / "base", num_hidden_layers=1)), new, {UP: linear}, {}
    )
    return linear


def run(folder: Path, linear: FactorizedLinear, x: np.ndarray, dialect: str = "portable") -> np.ndarray:
    chosen = DIALECTS[dialect]
    weights = Weights(open_checkpoint(folder), str(x.dtype))
    builder = GraphBuilder("pivot", chosen.opset, chosen.ir_version)
    value = builder.input("x", DTYPES[weights.dtype], ["batch", "seq", IN])
    form = next(form for form in named_forms(linear) if form.name == "pivot")
    context = LinearContext(builder, weights, False, {})
    builder.output(lower_form(context, form, linear, value, "/up"), "y")
    model = builder.model({}, "0")
    check_dialect(model, chosen)
    held = [v.const_value for v in model.graph.initializers.values() if v.const_value is not None]
    assert sum(t.size for t in held if "pivot.r" in str(t.name) or "dense" in str(t.name)) == form.elements - (
        linear.sparse.nnz if linear.sparse else 0
    )
    path = folder / "pivot.onnx"
    onnx.save(ir.to_proto(model), path)
    write_streamed(weights, folder)
    result: np.ndarray = onnxruntime.InferenceSession(path).run(None, {"x": x})[0]
    return result


def expected(folder: Path, linear: FactorizedLinear, x: np.ndarray) -> np.ndarray:
    held = {name: array.astype(np.float64) for name, array in load_file(folder / "model.safetensors").items()}
    y = x.astype(np.float64) @ held[f"{UP}.core0"] @ held[f"{UP}.core1"] + held.get(f"{UP}.bias", 0.0)
    if linear.sparse is not None:
        for row, column, value in zip(held[f"{UP}.r"], held[f"{UP}.c"], held[f"{UP}.v"], strict=True):
            y[..., int(row)] += value * x[..., int(column)]
    return y


@pytest.mark.parametrize("batch, seq", [(1, 1), (3, 7)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rank", [1, 8, 48])
def test_nodes_compute_the_factors(tmp_path: Path, rank: int, bias: bool, batch: int, seq: int) -> None:
    linear = stored(tmp_path / "model", rank, bias=bias)
    x = np.random.default_rng(seq).standard_normal((batch, seq, IN)).astype(np.float32)
    assert relative(run(tmp_path / "model", linear, x), expected(tmp_path / "model", linear, x)) < 1e-6


@pytest.mark.parametrize("dialect", sorted(DIALECTS))
def test_every_dialect_has_the_operators(tmp_path: Path, dialect: str) -> None:
    linear = stored(tmp_path / "model", 20, bias=True, sparse=True)
    x = np.random.default_rng(0).standard_normal((2, 5, IN)).astype(np.float32)
    assert relative(run(tmp_path / "model", linear, x, dialect), expected(tmp_path / "model", linear, x)) < 1e-6


def test_an_ill_conditioned_factor(tmp_path: Path) -> None:
    linear = stored(tmp_path / "model", 24, spread=1e6)
    x = np.random.default_rng(0).standard_normal((2, 5, IN)).astype(np.float32)
    assert relative(run(tmp_path / "model", linear, x), expected(tmp_path / "model", linear, x)) < 1e-6


def test_float16(tmp_path: Path) -> None:
    linear = stored(tmp_path / "model", 24)
    x = np.random.default_rng(0).standard_normal((2, 5, IN)).astype(np.float16)
    assert relative(run(tmp_path / "model", linear, x), expected(tmp_path / "model", linear, x)) < 2e-3


def test_the_factors_are_decomposed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    linear = stored(tmp_path / "model", 8)
    calls = []
    monkeypatch.setattr(lowering, "pivots", lambda *args: calls.append(1) or pivots(*args))
    run(tmp_path / "model", linear, np.ones((1, 1, IN), np.float32))
    assert len(calls) == 1


def test_a_wrong_order_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail."""

    def swapped(*args: object) -> object:
        found = pivots(*args)  # type: ignore[arg-type]
        return replace(found, order=np.roll(found.order, 1))

    linear = stored(tmp_path / "model", 8)
    monkeypatch.setattr(lowering, "pivots", swapped)
    x = np.random.default_rng(0).standard_normal((2, 5, IN)).astype(np.float32)
    assert relative(run(tmp_path / "model", linear, x), expected(tmp_path / "model", linear, x)) > 0.1


def test_what_is_not_accurate_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_tiny_low_rank(tmp_path / "model", write_tiny(tmp_path / "base", num_hidden_layers=1))
    monkeypatch.setattr(lowering, "pivots", lambda *args: pivots(*args, loss=0.1))
    with pytest.raises(
        UnsupportedError, match=r"up_proj: the form pivot does not .* float32: rounding would cost .*--form"
    ):
        export(model, tmp_path / "out", forms=[("up_proj", "pivot")], verify=False)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pivot")
    return write_tiny_low_rank(folder / "model", write_tiny(folder / "base", "qwen2", num_hidden_layers=1), 16)


def test_an_export_of_pivots_is_proven(tmp_path: Path, model: Path) -> None:
    result = export(model, tmp_path / "out", forms=[(".*", "pivot")])
    assert result.ok
    errors = [check.metrics["rel_l2"] for check in result.report.checks if "rel_l2" in check.metrics]
    assert errors and max(errors) <= 1e-5
    plan = result.manifest["plan"]
    assert {form["form"] for form in plan["forms"].values()} == {"pivot"}
    assert plan["elements"]["planned"] == plan["elements"]["stored"] - 16 * 16 * len(plan["forms"])
    graph = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False)
    held = [t for t in graph.graph.initializer if ".pivot." in t.name]
    assert sum(np.prod(t.dims) for t in held if not t.name.endswith("order")) == plan["elements"]["planned"]
    for tensor in held:
        if tensor.name.endswith("order"):
            order = numpy_helper.to_array(tensor, str(tmp_path / "out"))
            assert order.dtype == np.int32 and sorted(order) == list(range(len(order)))
    work = {node["name"]: node for node in inspect(tmp_path / "out")["work"]}
    for name, form in plan["forms"].items():
        node = next(node for found, node in work.items() if name.rpartition(".")[2] in found)
        assert node["macs"] == form["macs"] and node["products"] == 2 and node["transposes"] == form["transposes"] == 2


def test_targets_and_quantised_exports(tmp_path: Path, model: Path) -> None:
    """Blocks of integers take what is left as matrices of the checkpoint; pivot rows stay floats."""
    from mixt_export.quantisation import Quantisation

    export(model, tmp_path / "onnx", target="onnx", forms=[(".", "pivot")], verify=False)
    settings = Quantisation(bits=8, group=32, min_elements=64)
    result = export(model, tmp_path / "out", forms=[("up_proj", "pivot")], quantisation=settings, verify=False)
    listed = json.dumps(result.manifest["quantisation"]["matrices"])
    assert "down_proj" in listed and "up_proj" not in listed
    graph = onnx.load(tmp_path / "out" / "model.onnx")
    names = {tensor.name for tensor in graph.graph.initializer}
    assert {f"{UP}.pivot.rows", f"{UP}.pivot.rest", f"{UP}.pivot.order"} <= names


def test_what_has_no_pivots_says_so(tmp_path: Path, model: Path) -> None:
    with pytest.raises(UsageError, match=r"v_proj has no such form; it has chain"):
        folder = write_tiny_low_rank(tmp_path / "wide", model.parent / "base", {"v_proj": 40})
        export(folder, tmp_path / "out", forms=[("v_proj", "pivot")], verify=False)
