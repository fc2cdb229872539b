"""The MixT functions as ONNX Runtime executes them, against the Kronecker definition in float64."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from mixt_export.lower.functions import load_function
from mixt_export.lower.mixture import mixt_node, weight_names, weight_shape, window_weight
from mixt_export.plan import MixtForm, Mixture, mixt_forms
from tests.ortrun import relative
from tests.plan.oracle import CASES, case

ELEMENTS = {"float32": (TensorProto.FLOAT, 1e-6), "float16": (TensorProto.FLOAT16, 3e-3)}


def model_of(form: MixtForm, weights: list[np.ndarray], bias: np.ndarray | None, opset: int = 20) -> onnx.ModelProto:
    op, attributes = mixt_node(form)
    element = helper.np_dtype_to_tensor_dtype(weights[0].dtype)
    constants = [numpy_helper.from_array(np.ascontiguousarray(w), f"w{i}") for i, w in enumerate(weights)]
    constants += [] if bias is None else [numpy_helper.from_array(bias, "bias")]
    node = helper.make_node(op, ["x", *(c.name for c in constants)], ["y"], name="linear", domain="mixt", **attributes)
    x = helper.make_tensor_value_info("x", element, ["batch", "seq", form.in_features])
    y = helper.make_tensor_value_info("y", element, ["batch", "seq", form.out_features])
    graph = helper.make_graph([node], "g", [x], [y], constants)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("mixt", 1)]
    function = ir.serde.serialize_function(load_function(op))
    return helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=9)


def session(model: onnx.ModelProto, **entries: str) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    for key, value in entries.items():
        setattr(options, key, value)
    return ort.InferenceSession(model.SerializeToString(), options)


def weights_of(form: MixtForm, mixture: Mixture, cores: dict[str, np.ndarray], dtype: str) -> list[np.ndarray]:
    found = []
    for _, window in weight_names(form):
        weight = window_weight(form, window, mixture, cores.__getitem__)
        assert weight.shape == weight_shape(form, window)
        found.append(weight.astype(dtype))
    return found


@pytest.mark.parametrize("dtype", ELEMENTS)
@pytest.mark.parametrize("shape", CASES)
def test_every_form_computes_the_definition(shape: tuple, dtype: str) -> None:
    linear, cores, matrix = case(*shape)
    mixture = Mixture.of(linear)
    _, tolerance = ELEMENTS[dtype]
    rng = np.random.default_rng(7)
    xs = [rng.standard_normal((batch, seq, shape[0])).astype(dtype) for batch, seq in ((1, 1), (3, 1), (1, 7), (2, 5))]
    for form in mixt_forms(linear):
        if form.dense:
            continue
        running = session(model_of(form, weights_of(form, mixture, cores, dtype), None))
        for x in xs:
            found = running.run(None, {"x": x})[0]
            assert found.dtype == x.dtype and found.shape == (*x.shape[:2], shape[1])
            expected = x.astype(np.float64) @ matrix.T
            assert relative(found, expected) < tolerance, (form.name, x.shape)


@pytest.mark.parametrize("shape", [CASES[2], CASES[9]])
def test_bias(shape: tuple) -> None:
    linear, cores, matrix = case(*shape)
    mixture = Mixture.of(linear)
    rng = np.random.default_rng(8)
    bias, x = rng.standard_normal(shape[1]), rng.standard_normal((2, 3, shape[0]))
    for plain in mixt_forms(linear):
        if plain.dense:
            continue
        form = MixtForm(plain.name, plain.layout, plain.windows, plain.in_features, plain.out_features, bias=True)
        running = session(model_of(form, weights_of(form, mixture, cores, "float32"), bias.astype(np.float32)))
        found = running.run(None, {"x": x.astype(np.float32)})[0]
        assert relative(found, x @ matrix.T + bias) < 1e-6, form.name


def test_a_wrong_weight_is_noticed() -> None:
    """The comparison above can fail: two windows' weights of equal shape, exchanged."""
    linear, cores, matrix = case(*CASES[2])
    form = {form.name: form for form in mixt_forms(linear)}["pairs"]
    weights = weights_of(form, Mixture.of(linear), cores, "float32")[::-1]
    x = np.random.default_rng(9).standard_normal((1, 4, CASES[2][0])).astype(np.float32)
    assert relative(session(model_of(form, weights, None)).run(None, {"x": x})[0], x @ matrix.T) > 0.1


def test_the_optimiser_neither_grows_the_weights_nor_takes_the_transposes_into_the_products(tmp_path) -> None:
    """A transpose fused into a product makes one small product for each token; the reshape between prevents it."""
    linear, cores, _ = case(96, 160, 4, 2, False)
    mixture = Mixture.of(linear)
    for form in mixt_forms(linear):
        if form.dense:
            continue
        path = tmp_path / "optimised.onnx"
        model = model_of(form, weights_of(form, mixture, cores, "float32"), None, opset=23)
        session(model, optimized_model_filepath=str(path))
        optimised = onnx.load(path)
        held = sum(int(np.prod(t.dims)) for t in optimised.graph.initializer if t.data_type == TensorProto.FLOAT)
        assert held == form.elements
        operators = [node.op_type for node in optimised.graph.node]
        assert operators.count("Transpose") == form.transposes
        assert operators.count("MatMul") == len(form.windows)
        assert len(operators) == form.nodes, (form.name, operators)


def test_nodes_are_counted() -> None:
    for shape in CASES:
        for form in mixt_forms(case(*shape)[0]):
            if not form.dense:
                body = [node for node in load_function(mixt_node(form)[0]) if node.op_type != "Constant"]
                assert len(body) == form.nodes, form
