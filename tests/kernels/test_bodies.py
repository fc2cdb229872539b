"""The same nodes without a kernel: ONNX Runtime and TensorRT-RTX execute the function, whatever the namespace."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mixt_export.building import build_engine
from mixt_export.lower.fused import PLUGIN_ATTRIBUTES, fused_function, fused_node
from mixt_export.network import build
from tests.kernels.models import exported
from tests.lower.test_functions import text_function
from tests.ortrun import Graph, relative


@pytest.mark.parametrize(("structure", "sm"), [("train2", 120), ("mixt", 86)])
def test_rtx_builds_the_bodies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, structure: str, sm: int) -> None:
    monkeypatch.setattr("mixt_export.building.kernels.carry.triton_version", lambda: None)
    out = exported(monkeypatch, tmp_path, structure)
    graph = onnx.load(out / "model.onnx", load_external_data=False)
    assert any(attribute.name == "aot" for node in graph.graph.node for attribute in node.attribute)
    report = build_engine(out, backend="rtx", sm=sm)
    assert report.layers > 50 and report.kernels == "no compiled kernels: every operator is built from standard ones"


def test_onnxruntime_runs_fused_nodes_like_any_other_graph(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The graph for JetPack 7 has seven, the one for JetPack 6 none."""
    monkeypatch.setattr("mixt_export.building.kernels.carry.triton_version", lambda: None)
    logits = []
    for jetpack in (6, 7):
        graph = Graph(exported(monkeypatch, tmp_path / str(jetpack), "train2", jetpack=jetpack, dtype="fp32"))
        ids = np.arange(8, dtype=np.int64).reshape(2, 4)
        logits.append(graph.run(ids)[0])
    assert relative(logits[1], logits[0].astype(np.float64)) < 1e-5


def one_node(folder: Path, namespace: str | None, *, function: bool = True) -> Path:
    """x -> TTLinear2Bias -> y in float16, with or without the function."""
    linear = build.tensor_train("w", (4, 8), (3, 8), (8,), bias=True)
    fused = fused_node(linear, "float16", largest_waste=1e9)
    assert fused is not None
    rng = np.random.default_rng(0)
    arrays = {ref.name: rng.standard_normal(ref.shape).astype(np.float16) for ref in linear.tensors()}
    attributes = {name: value for name, value in fused.attributes.items() if name not in PLUGIN_ATTRIBUTES}
    if namespace is not None:
        attributes |= PLUGIN_ATTRIBUTES | {"plugin_namespace": namespace}
    node = helper.make_node(fused.op_type, ["x", *arrays], ["y"], name="n", domain="mixt", **attributes)
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["b", "s", size])
        for name, size in (("x", 32), ("y", 24))
    ]
    graph = helper.make_graph(
        [node], "g", values[:1], values[1:], [numpy_helper.from_array(a, n) for n, a in arrays.items()]
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("mixt", 1)]
    functions = [text_function(fused.op_type)] if function else []
    model = helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=10)
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def parsed_by_rtx(path: Path) -> tuple[bool, list[str], str]:
    """Whether TensorRT-RTX parses it, the kinds of layers it made, and its first error."""
    import tensorrt_rtx as trt

    class Quiet(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: object, text: str) -> None:
            return

    logger = Quiet()
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    done = parser.parse_from_file(str(path))
    kinds = [str(network.get_layer(index).type) for index in range(network.num_layers)]
    return done, kinds, parser.get_error(0).desc() if parser.num_errors else ""


@pytest.mark.parametrize("namespace", ["mixt", "elsewhere", None])
def test_without_a_plugin_the_function_is_taken(tmp_path: Path, namespace: str | None) -> None:
    done, kinds, error = parsed_by_rtx(one_node(tmp_path, namespace))
    assert done and not error and sum("MATRIX_MULTIPLY" in kind for kind in kinds) == 2


def test_without_plugin_and_function_it_is_an_error(tmp_path: Path) -> None:
    done, _, error = parsed_by_rtx(one_node(tmp_path, "mixt", function=False))
    assert not done and "lugin" in error


def test_functions_declare_what_nodes_say() -> None:
    mixture = [f"MixTLinear{n}{kind}{bias}" for n in (2, 6) for kind in ("", "Padded", "Left") for bias in ("", "Bias")]
    for name in (*mixture, "TTLinear2", "TTLinear2Bias"):
        declared = set(fused_function(name).attributes)
        assert set(PLUGIN_ATTRIBUTES) <= declared
        assert ("windows" in declared) == name.startswith("MixT")


def test_what_is_no_tensor_train_is_left_alone() -> None:
    """Low rank, a ring, modes that no kernel loads, ranks and modes beyond the largest, more than two sites."""
    linears = [
        build.low_rank("w", 64, 64, 16),
        build.tensor_ring("w", (4, 4, 8), (4, 4, 8), (4, 4, 4)),
        build.tensor_train("w", (8, 9), (8, 8), (16,)),
        build.tensor_train("w", (8, 8), (8, 8), (65,)),
        build.tensor_train("w", (8, 72), (8, 8), (16,)),
        build.tensor_train("w", (4, 4, 8), (4, 4, 8), (4, 4)),
    ]
    assert all(fused_node(linear, "float16", largest_waste=1e9) is None for linear in linears)
    served = build.tensor_train("w", (8, 8), (8, 8), (16,))
    assert fused_node(served, "float16", largest_waste=1e9) is not None
    assert all(fused_node(served, dtype, largest_waste=1e9) is None for dtype in ("bfloat16", "float32"))
