"""A form of a linear in an ONNX Runtime session, with as many distinct weights as it takes to leave the caches."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from mixt_export.calibration.probe import values
from mixt_export.lower.functions import load_function
from mixt_export.lower.mixture import mixt_node, weight_names, weight_shape
from mixt_export.lower.network_function import function_for
from mixt_export.network import FactorizedLinear
from mixt_export.plan.forms import Form
from mixt_export.plan.merged import merge
from mixt_export.plan.windows import MixtForm

WEIGHT_BYTES = 16 << 20
MOST_COPIES = 48


def copies_of(form: Form) -> int:
    """Linears in one session."""
    return max(1, min(MOST_COPIES, WEIGHT_BYTES // (4 * form.elements)))


def session(linear: FactorizedLinear, form: Form) -> ort.InferenceSession:
    """`copies_of` linears of random weights over one input x (1, rows, in); a slice of a few numbers reads each."""
    op, function, shapes, attributes = _node(linear, form)
    nodes, outputs = [], []
    weights = [numpy_helper.from_array(np.array([i]), f"i{i}") for i in range(3)]
    for copy in range(copies_of(form)):
        names = [f"w{copy}_{index}" for index in range(len(shapes))]
        weights += [
            numpy_helper.from_array(values(shape, 31 * copy + index), name)
            for index, (name, shape) in enumerate(zip(names, shapes, strict=True))
        ]
        domain = {"domain": "mixt"} if function is not None else {}
        nodes.append(helper.make_node(op, ["x", *names], [f"z{copy}"], name=f"linear{copy}", **domain, **attributes))
        nodes.append(helper.make_node("Slice", [f"z{copy}", "i0", "i1", "i2"], [f"y{copy}"], name=f"slice{copy}"))
        outputs.append(helper.make_tensor_value_info(f"y{copy}", TensorProto.FLOAT, None))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "rows", linear.in_features])
    graph = helper.make_graph(nodes, "g", [x], outputs, weights)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("mixt", 1)]
    functions = [] if function is None else [function]
    model = helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(
        model.SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=["CommonSubexpressionElimination"],  # would permute the common input once for all copies
    )


def _node(linear: FactorizedLinear, form: Form) -> tuple[str, Any, list[tuple[int, ...]], dict[str, Any]]:
    """Operator, its function (None: a standard one), the shapes of its weights, its attributes."""
    if form.dense:
        return "MatMul", None, [(linear.in_features, linear.out_features)], {}
    if isinstance(form, MixtForm):
        op, attributes = mixt_node(form)
        function = ir.serde.serialize_function(load_function(op))
        return op, function, [weight_shape(form, window) for _, window in weight_names(form)], dict(attributes)
    network = merge(linear, form.groups).network
    orders = [tuple(range(len(branch.cores))) for branch in network.branches]
    made = function_for(network, 23, orders=orders, left_from=form.left_from)
    return made.proto.name, made.proto, [operand.shape for operand in made.operands], {}
