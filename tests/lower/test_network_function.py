"""Functions of any network through onnxruntime against float64, and what their bodies may and may not contain."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from onnx import helper, numpy_helper

from mixt_export.errors import UnsupportedError
from mixt_export.lower.network_function import NetworkFunction, function_for
from mixt_export.network import FactorizedLinear, build, macs
from tests.network.cases import CASES, Case, identity, random_values, relative
from tests.network.random_networks import brute_matrix, linears

ALLOWED = {"MatMul", "Reshape", "Transpose", "Mul", "Add", "Constant", "CastLike", "Pad", "Slice", "Identity"}
LARGE = build.kronecker("large", (6, 96), (7, 80), 2)


FLAT_ALLOWED = ALLOWED | {"Shape", "Gather", "Concat"}


def model_of(function: NetworkFunction, linear: FactorizedLinear, values: dict[str, np.ndarray], dtype: np.dtype):
    """A model of one call, its operands as initializers, in ``dtype``."""
    kind = helper.np_dtype_to_tensor_dtype(dtype)
    names = [f"operand{index}" for index in range(len(function.operands))]
    constants = [
        numpy_helper.from_array(values[o.tensor].astype(dtype).transpose(o.perm).reshape(o.shape), name)
        for o, name in zip(function.operands, names, strict=True)
    ]
    graph = helper.make_graph(
        [helper.make_node(function.proto.name, ["x", *names], ["y"], domain="mixt")],
        "call",
        [helper.make_tensor_value_info("x", kind, ["batch", "seq", linear.in_features])],
        [helper.make_tensor_value_info("y", kind, ["batch", "seq", linear.out_features])],
        constants,
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("mixt", 1)]
    model = helper.make_model(graph, functions=[function.proto], opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def run(linear: FactorizedLinear, values: dict[str, np.ndarray], x: np.ndarray, **options: bool) -> np.ndarray:
    """What onnxruntime computes, in the dtype of x."""
    model = model_of(function_for(linear, **options), linear, values, x.dtype)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def expected_output(
    linear: FactorizedLinear, matrix: np.ndarray, values: dict[str, np.ndarray], x: np.ndarray
) -> np.ndarray:
    y = x.astype(np.float64) @ matrix.T
    return y if linear.bias is None else y + values[linear.bias.name].astype(np.float64)


def products_of_constants(proto: onnx.FunctionProto) -> list[str]:
    """Nodes that combine two values neither of which depends on x."""
    constant = set(proto.input) - {"x"}
    found = []
    for node in proto.node:
        if all(name in constant for name in node.input):
            constant.update(node.output)
            if node.op_type in ("MatMul", "Mul", "Add"):
                found.append(node.name)
    return found


@pytest.mark.parametrize("options", [{}, {"flat": True}, {"einsum_nodes": True}, {"left_from": 2}], ids=str)
@pytest.mark.parametrize("case", CASES, ids=identity)
def test_onnxruntime_computes_the_oracle(case: Case, options: dict[str, bool]) -> None:
    values = random_values(case.linear, seed=1, dtype="float32")
    matrix = case.matrix({name: value.astype(np.float64) for name, value in values.items()})
    rng = np.random.default_rng(2)
    for batch, seq in ((1, 1), (1, 7), (3, 1), (2, 7)):
        x = rng.standard_normal((batch, seq, case.linear.in_features)).astype(np.float32)
        assert relative(run(case.linear, values, x, **options), expected_output(case.linear, matrix, values, x)) <= 1e-5


def test_left_product() -> None:
    """Wide enough behind the contracted axis that the core multiplies from the left."""
    values = random_values(LARGE, seed=3, dtype="float32")
    cores = [values[f"large.core{site}"].astype(np.float64) for site in range(2)]
    matrix = sum(np.kron(cores[0][term], cores[1][term]) for term in range(2))
    proto = function_for(LARGE).proto
    assert any(node.op_type == "MatMul" and node.input[0].startswith("core") for node in proto.node)
    x = np.random.default_rng(4).standard_normal((2, 3, LARGE.in_features)).astype(np.float32)
    assert relative(run(LARGE, values, x), expected_output(LARGE, matrix, values, x)) <= 1e-5


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_body_follows_the_dtype_of_x(dtype: str) -> None:
    linear = build.mixt("mixt", 24, 11, 3, paper_padding=True, bias=True)
    values = random_values(linear, seed=5, dtype="float16")
    names = [f"mixt.branch{k}.core0" for k in range(3)]
    matrix = np.zeros((16, 32))
    for k, name in enumerate(names):
        matrix += np.kron(np.kron(np.eye(2**k), values[name].astype(np.float64)), np.eye(2 ** (2 - k))) / 3
    x = np.random.default_rng(6).standard_normal((2, 3, 24)).astype(dtype)
    bound = {"float16": 3e-3, "float64": 1e-7}[dtype]
    assert relative(run(linear, values, x), expected_output(linear, matrix[:11, :24], values, x)) <= bound


@settings(max_examples=60, deadline=None)
@given(linears())
def test_any_network(linear: FactorizedLinear) -> None:
    values = random_values(linear, seed=7, dtype="float32")
    wide = {name: value.astype(np.float64) for name, value in values.items()}
    x = np.random.default_rng(8).standard_normal((2, 3, linear.in_features)).astype(np.float32)
    expected = expected_output(linear, brute_matrix(linear, wide), values, x)
    scale = 1.0 + np.abs(brute_matrix(linear, {name: np.abs(value) for name, value in wide.items()})).max()
    for flat in (False, True):
        assert np.abs(run(linear, values, x, flat=flat) - expected).max() <= 1e-4 * scale
    assert products_of_constants(function_for(linear).proto) == []


@pytest.mark.parametrize("case", CASES, ids=identity)
def test_a_flat_body_never_permutes_beside_an_axis_of_positions(case: Case) -> None:
    """TensorRT-RTX fails on permuted axes with one of size 1 among them; batch and positions must be one axis there."""
    plain, flat = function_for(case.linear), function_for(case.linear, flat=True)
    assert {node.op_type for node in flat.proto.node} <= FLAT_ALLOWED
    assert (flat.transposes, flat.macs) == (plain.transposes, plain.macs)
    shapes = {node.output[0]: list(node.attribute[0].ints) for node in flat.proto.node if node.op_type == "Constant"}
    makers = {node.output[0]: node for node in flat.proto.node}
    for node in flat.proto.node:
        source = makers.get(node.input[0]) if node.op_type == "Transpose" else None
        if source is not None and source.op_type == "Reshape":
            assert 0 not in shapes[source.input[1]][1:]


@pytest.mark.parametrize("case", CASES, ids=identity)
def test_body(case: Case) -> None:
    function = function_for(case.linear)
    proto = function.proto
    assert {node.op_type for node in proto.node} <= ALLOWED
    assert products_of_constants(proto) == []
    outputs = [name for node in proto.node for name in node.output]
    names = [node.name for node in proto.node]
    assert len(set(outputs)) == len(outputs)
    assert len(set(names)) == len(names)
    assert all(names)
    cores = len(function.operands) - (case.linear.bias is not None)
    assert list(proto.input) == ["x", *(f"core{k}" for k in range(cores))] + (["bias"] if case.linear.bias else [])
    assert list(dict.fromkeys(function.tensors)) == [tensor.name for tensor in case.linear.tensors()]
    assert function.macs == macs(case.linear)
    for node in proto.node:  # nothing is done to a core but multiplying
        cores_read = [name for name in node.input if name.startswith("core")]
        assert not cores_read or (node.op_type in ("MatMul", "Mul") and len(cores_read) == 1)
    onnx.parser.parse_function(onnx.printer.to_text(proto))


def test_a_product_of_constants_would_be_found() -> None:
    nodes = [
        helper.make_node("MatMul", ["core0", "core1"], ["w"], name="dense"),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    proto = helper.make_function("mixt", "f", ["x", "core0", "core1"], ["y"], nodes, [helper.make_opsetid("", 23)])
    assert products_of_constants(proto) == ["dense"]


def kinds(function: NetworkFunction) -> Counter[str]:
    return Counter(node.op_type for node in function.proto.node)


def test_low_rank_is_two_matmuls_on_the_cores_in_place() -> None:
    function = function_for(build.low_rank("l", 64, 48, 8, bias=True))
    assert [(node.op_type, list(node.input)) for node in function.proto.node] == [
        ("MatMul", ["x", "core0"]),
        ("MatMul", ["step0_y", "core1"]),
        ("Add", ["step1_y", "bias"]),
    ]
    assert function.transposes == 0


@pytest.mark.parametrize(
    "linear",
    [
        build.blast("l", 576, 576, 72, (8, 8)),
        build.tensor_train("l", (4, 6, 4, 6), (4, 6, 4, 6), (8, 8, 8)),
        build.monarch("l", (24, 24), (24, 24)),
    ],
    ids=lambda linear: linear.method,
)
def test_onnxruntime_joins_no_transpose_with_what_follows(linear: FactorizedLinear, tmp_path: Path) -> None:
    """Neither with a product, which would then run token by token, nor two that move one axis each."""
    order = tuple(range(len(linear.branches[0].cores)))
    function = function_for(linear, orders=(order,))
    path = tmp_path / "optimised.onnx"
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(path), 3
    model = model_of(function, linear, random_values(linear, 3), np.dtype(np.float32))
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    operators = Counter(node.op_type for node in onnx.load(path).graph.node)
    assert function.transposes > 0
    assert (operators["Transpose"], operators["FusedMatMul"]) == (function.transposes, 0)


def test_mixt_transposes_are_counted() -> None:
    function = function_for(build.mixt("m", 64, 64, 4))
    assert function.transposes == 6
    assert kinds(function)["Transpose"] == function.transposes
    assert kinds(function)["MatMul"] == 4
    assert kinds(function)["Mul"] == 1


def test_padding_and_cropping_happen_once() -> None:
    count = kinds(function_for(build.mixt("m", 20, 11, 3, paper_padding=True)))
    assert (count["Pad"], count["Slice"]) == (1, 1)


def test_equal_structures_share_one_function() -> None:
    first = function_for(build.tensor_train("a", (3, 5), (2, 7), (4,)))
    second = function_for(build.tensor_train("b", (3, 5), (2, 7), (4,)))
    assert first.proto == second.proto
    assert first.tensors != second.tensors
    assert first.proto.name.startswith("TensorTrainLinear_")
    sizes = {function_for(build.low_rank("l", i, o, r)).proto.name for i, o, r in ((4, 6, 2), (9, 3, 1))}
    assert len(sizes) == 1
    assert sizes.pop().startswith("LowRankLinear_")


def test_other_structures_have_other_names() -> None:
    linears_ = [
        build.tensor_train("a", (3, 5), (2, 7), (4,)),
        build.tensor_train("a", (3, 5), (2, 7), (4,), bias=True),
        build.tensor_train("a", (5, 3), (2, 7), (4,)),
        build.tensor_train("a", (3, 5), (2, 7), (3,)),
        build.kronecker("a", (3, 3), (2, 2), 2),
    ]
    names = [function_for(linear).proto.name for linear in linears_]
    assert len(set(names)) == len(names)


def test_a_shared_tensor_is_one_input() -> None:
    function = function_for(build.kronecker("a", (3, 3), (2, 2), 2, names=("w", "w")))
    assert set(function.tensors) == {"w"}
    twice = function_for(build.kronecker("a", (3, 3), (2, 2), 2, names=("w", "v")))
    assert len(function.operands) <= len(twice.operands)


def test_method_without_a_name() -> None:
    assert function_for(build.dense("d", 3, 2, method="")).proto.name.startswith("NetworkLinear_")
    assert function_for(build.dense("d", 3, 2, method="svd-llm v2")).proto.name.startswith("SvdLlmV2Linear_")


def test_sparse_residual_is_unsupported() -> None:
    linear = build.with_sparse(build.low_rank("layer", 4, 6, 2), 3)
    with pytest.raises(UnsupportedError, match="'layer' has a sparse residual"):
        function_for(linear)


def test_a_swapped_core_is_seen() -> None:
    linear = build.mixt("m", 24, 24, 2)
    values = random_values(linear, seed=9, dtype="float32")
    swapped = {"m.branch0.core0": values["m.branch1.core0"], "m.branch1.core0": values["m.branch0.core0"]}
    x = np.random.default_rng(10).standard_normal((1, 2, 24)).astype(np.float32)
    assert relative(run(linear, swapped, x), run(linear, values, x)) > 0.1
