"""The graph that rounds every 16-bit value: it overflows where an engine would, and it misses no value in silence."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from mixt_export.errors import UnsupportedError
from mixt_export.verification.rounding import rounding

HALF, SINGLE = TensorProto.FLOAT16, TensorProto.FLOAT


def model(*nodes: onnx.NodeProto, output: int = SINGLE) -> onnx.ModelProto:
    """From x (4,) float16 and w (4,) float16 to y (4,)."""
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info("x", HALF, [4])],
        [helper.make_tensor_value_info("y", output, [4])],
        [numpy_helper.from_array(np.full(4, 300, np.float16), "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def run(proto: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def test_a_value_between_two_operators_overflows() -> None:
    """300 · 300 leaves float16 although the next operator makes it small again."""
    proto = model(
        helper.make_node("Mul", ["x", "w"], ["big"], name="/mul"),
        helper.make_node("Div", ["big", "w"], ["small"], name="/div"),
        helper.make_node("Cast", ["small"], ["y"], name="/cast", to=SINGLE),
    )
    x = np.array([1, 100, 300, -300], np.float32)
    assert np.array_equal(run(rounding(proto, "float16"), x), [1, 100, np.inf, -np.inf])


def test_a_value_of_unknown_type_is_no_silence() -> None:
    """An operator that shape inference does not know: nobody could say whether its result is rounded."""
    proto = model(
        helper.make_node("FusedMul", ["x", "w"], ["mystery"], name="/block/fused", domain="com.example"),
        helper.make_node("Cast", ["mystery"], ["y"], name="y", to=SINGLE),
    )
    proto.opset_import.append(helper.make_opsetid("com.example", 1))
    with pytest.raises(
        UnsupportedError, match=r"'/block/fused' \(com.example::FusedMul\).*'mystery'.*cannot be inferred"
    ):
        rounding(proto, "float16")
