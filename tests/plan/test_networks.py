"""Every form of every structure computes the oracle's matrix, and executes what it says: nodes, MACs, weights."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from onnx import helper, numpy_helper

from mixt_export.errors import NetworkError
from mixt_export.lower.network_function import NetworkFunction, function_for
from mixt_export.network import Branch, Core, FactorizedLinear, TensorRef, build
from mixt_export.plan import MixtForm, NetworkForm, forms_of
from mixt_export.plan.forms import structure
from mixt_export.plan.merged import dense_weight, merge
from mixt_export.plan.networks import NAIVE, network_form, network_forms
from tests.network.cases import CASES, SPARSE_CASES, Case, identity, random_values, relative
from tests.network.random_networks import brute_matrix, linears

NETWORKS = [case for case in CASES if not isinstance(forms_of(case.linear)[0], MixtForm)]
LARGE = {
    "train 3": build.tensor_train("a", (16, 16, 16), (16, 16, 16), (32, 32)),
    "train 4": build.tensor_train("a", (8, 8, 4, 16), (8, 8, 4, 16), (16, 16, 16)),
    "kronecker": build.kronecker("a", (64, 32), (32, 64), 4),
    "low rank": build.low_rank("a", 512, 256, 64),
    "tucker": build.tucker2("a", 512, 256, 64, 32),
    "heads q": build.tucker_heads("a.q", "q", 512, 8, 64, (32, 16, 2), shared="a"),
    "heads o": build.tucker_heads("a.o", "o", 512, 8, 64, (32, 16, 2), shared="a"),
}


def function_of(
    form: NetworkForm, linear: FactorizedLinear, **options: bool
) -> tuple[NetworkFunction, dict[str, object]]:
    found = merge(linear, form.groups)
    orders = [tuple(range(len(branch.cores))) for branch in found.network.branches]
    return function_for(found.network, orders=orders, left_from=form.left_from, **options), dict(found.sources)


def session(
    form: NetworkForm, linear: FactorizedLinear, values: dict[str, np.ndarray], **options: bool
) -> onnxruntime.InferenceSession:
    function, sources = function_of(form, linear, **options)
    arrays = []
    for operand in function.operands:
        source = sources.get(operand.tensor)
        array = values[operand.tensor] if source is None else source.make(values.__getitem__)
        arrays.append(np.array(array.transpose(operand.perm).reshape(operand.shape), order="C"))
    names = [f"w{index}" for index in range(len(arrays))]
    double = onnx.TensorProto.DOUBLE
    graph = helper.make_graph(
        [helper.make_node(function.proto.name, ["x", *names], ["y"], domain="mixt")],
        "call",
        [helper.make_tensor_value_info("x", double, ["batch", "seq", linear.in_features])],
        [helper.make_tensor_value_info("y", double, ["batch", "seq", linear.out_features])],
        [numpy_helper.from_array(array, name) for array, name in zip(arrays, names, strict=True)],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("mixt", 1)]
    model = helper.make_model(graph, functions=[function.proto], opset_imports=opsets, ir_version=10)
    settings_ = onnxruntime.SessionOptions()
    settings_.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), settings_, providers=["CPUExecutionProvider"])


def check(
    form: NetworkForm,
    linear: FactorizedLinear,
    values: dict[str, np.ndarray],
    matrix: np.ndarray,
    bound: float = 1e-11,
) -> None:
    x = np.random.default_rng(3).standard_normal((2, 3, linear.in_features))
    expected = x @ matrix.T + (0 if linear.bias is None else values[linear.bias.name])
    bound *= 1 + np.abs(expected).max()
    for options in ({}, {"flat": True}, {"einsum_nodes": True}):
        found = session(form, linear, values, **options).run(None, {"x": x})[0]
        assert np.abs(found - expected).max() <= bound, (form.name, options)


@pytest.mark.parametrize("case", NETWORKS, ids=identity)
def test_every_form_is_the_matrix(case: Case) -> None:
    values = random_values(case.linear, seed=1)
    matrix = case.matrix(values)
    forms = forms_of(case.linear)
    assert forms[-1].dense and forms[-1].name == "dense" and not forms[0].dense
    assert len({form.name for form in forms}) == len(forms)
    for form in forms[:-1]:
        check(form, case.linear, values, matrix)
    assert relative(dense_weight(case.linear, values.__getitem__), matrix.T) <= 1e-12


@pytest.mark.parametrize("case", SPARSE_CASES, ids=identity)
def test_the_dense_form_holds_the_sparse_residual(case: Case) -> None:
    values = random_values(case.linear, seed=2)
    assert relative(dense_weight(case.linear, values.__getitem__), case.matrix(values).T) <= 1e-12
    stored = forms_of(case.linear)[0]
    assert stored.elements == sum(t.size for t in case.linear.core_tensors()) + case.linear.sparse.nnz
    assert [operation.kind for operation in stored.operations].count("sparse") == 1


@settings(max_examples=12, deadline=None)
@given(linears())
def test_forms_of_any_network(linear: FactorizedLinear) -> None:
    values = random_values(linear, seed=7)
    matrix = brute_matrix(linear, values)
    forms = forms_of(linear)
    for form in forms[:-1]:
        if isinstance(form, NetworkForm):
            check(form, linear, values, matrix, 1e-6)  # a scale is a float32 constant


def test_a_wrong_group_is_noticed() -> None:
    """The comparison can fail: the tensor of another group's name."""
    linear = build.tensor_train("a", (2, 2, 2), (2, 2, 2), (2, 2))
    values = random_values(linear, seed=4)
    form = network_form(linear, (((0, 1), (2,)),))
    exchanged = values | {"a.core0": values["a.core0"][:, ::-1].copy()}
    x = np.random.default_rng(5).standard_normal((1, 2, 8))
    found, other = (session(form, linear, v).run(None, {"x": x})[0] for v in (values, exchanged))
    assert relative(found, other) > 0.1


def executed_macs(form: NetworkForm, linear: FactorizedLinear) -> int:
    """Multiply-adds of the function's MatMuls for one token, by onnx's own shape inference."""
    function, _ = function_of(form, linear)
    shapes = {"x": (1, 1, linear.in_features)}
    shapes |= {name: o.shape for name, o in zip(list(function.proto.input)[1:], function.operands, strict=True)}
    constants = {n.output[0]: list(n.attribute[0].ints) for n in function.proto.node if n.op_type == "Constant"}
    nodes = [node for node in function.proto.node if node.op_type != "Constant"]
    initializers = [numpy_helper.from_array(np.array(v, np.int64), k) for k, v in constants.items() if v]
    kind = onnx.TensorProto.FLOAT
    inputs = [helper.make_tensor_value_info(name, kind, shape) for name, shape in shapes.items()]
    scales = [helper.make_tensor_value_info(name, kind, []) for name in constants if not constants[name]]
    graph = helper.make_graph(nodes, "g", inputs + scales, [], initializers)
    model = onnx.shape_inference.infer_shapes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]), data_prop=True, strict_mode=True
    )
    for value in model.graph.value_info:
        shapes[value.name] = tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
    total = 0
    for node in nodes:
        if node.op_type == "MatMul":
            total += int(np.prod(shapes[node.output[0]])) * shapes[node.input[0]][-1]
    return total


@pytest.mark.parametrize("linear", [*LARGE.values(), *(case.linear for case in NETWORKS)], ids=lambda item: item.name)
def test_what_is_counted_is_executed(linear: FactorizedLinear) -> None:
    for form in forms_of(linear)[:-1]:
        function, _ = function_of(form, linear)
        kinds = [node.op_type for node in function.proto.node if node.op_type not in ("Constant", "CastLike")]
        assert len(kinds) == form.nodes, (form.name, kinds)
        assert kinds.count("Transpose") == form.transposes == function.transposes
        assert executed_macs(form, linear) == form.macs, form.name
        weights = {(o.tensor, o.perm): int(np.prod(o.shape)) for o in function.operands}
        bias = 0 if linear.bias is None else linear.out_features
        assert sum(weights.values()) - bias == form.elements, form.name


@pytest.mark.parametrize("name", LARGE)
def test_no_activation_is_permuted(name: str) -> None:
    """Low rank, trains, Kronecker sums and Tucker run without a transpose where streaming axes are wide enough."""
    assert forms_of(LARGE[name])[0].transposes == 0


def test_names() -> None:
    names = [form.name for form in forms_of(LARGE["train 3"])]
    assert names[0] == "chain" and {"chain:reversed", "merged:1,2-3", "dense"} <= set(names)
    assert {form.name for form in forms_of(LARGE["low rank"])} == {"chain", "dense"}
    assert network_form(LARGE["train 4"], (((0, 2), (1,), (3,)),)).name == "merged:1&3,2,4"
    assert network_form(LARGE["train 3"], (((1,), (0,), (2,)),)).name == "order:2,1,3"


def test_a_train_of_order_12_has_forms_that_are_not_naive() -> None:
    """4096 x 4096 with rank 64: 20 times the dense work core by core."""
    linear = build.tensor_train("a", (2,) * 12, (2,) * 12, (64,) * 11)
    forms = forms_of(linear)
    dense = forms[-1].macs
    assert forms[0].macs > 2 * NAIVE * dense
    good = [form for form in forms[1:-1] if form.macs <= 2 * dense]
    assert good and min(form.elements for form in good) < 0.04 * forms[-1].elements


def test_both_directions_and_widths_are_offered() -> None:
    """576 = 9 · 8 · 8: a streaming axis of 9 columns is too narrow for left products, and permuting costs as well."""
    forms = {form.name: form for form in forms_of(build.tensor_train("a", (8, 8, 9), (8, 9, 8), (8, 8)))}
    assert {"chain", "chain:left"} <= set(forms)
    assert forms["chain"].transposes > forms["chain:left"].transposes


def test_a_merged_core_with_too_many_axes_is_no_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four bonds in, thirteen out: together the two cores in the middle have 17 axes, one more than a core can have."""
    bonds, right, left = (tuple(f"{side}{n}" for n in range(count)) for side, count in (("b", 4), ("c", 7), ("d", 6)))
    cores = {
        ("i", *bonds): (512, 2, 2, 2, 2),
        (*bonds[:2], "s", *right): (2,) * 10,
        (*bonds[2:], "s", *left): (2,) * 9,
        (*right, "o"): (*(2,) * 7, 32),
        (*left, "p"): (*(2,) * 6, 16),
    }
    made = tuple(Core(TensorRef(str(n), shape, "float32"), labels) for n, (labels, shape) in enumerate(cores.items()))
    linear = FactorizedLinear("wide", 512, 512, (Branch((("i", 512),), (("o", 32), ("p", 16)), made),))
    together = ((0,), (1, 2), (3,), (4,))
    with pytest.raises(NetworkError, match="at most 16 axes"):
        network_form(linear, (together,))
    monkeypatch.setattr("mixt_export.plan.networks.candidates", lambda branch, limit: [together])
    names = [form.name for form in network_forms(linear)]
    assert names[-1] == "dense" and names[0].startswith("order") and not any("2-3" in name for name in names)


def test_equal_structures_share_their_forms() -> None:
    first, second = (build.tensor_train(name, (4, 4), (4, 4), (3,), bias=True) for name in ("a", "b"))
    assert forms_of(first) is forms_of(second)
    assert structure(first) == structure(second) != structure(build.tensor_train("a", (4, 4), (4, 4), (3,)))
    assert structure(build.kronecker("a", (3, 3), (2, 2), 2)) != structure(
        build.kronecker("a", (3, 3), (2, 2), 2, names=("w", "w"))
    )
