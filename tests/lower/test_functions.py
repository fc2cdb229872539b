"""graphs/ops/*.onnxtxt is what exported models carry, and it computes what the oracle computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from mixt_export.resources import resource
from mixt_export.targets import export
from tests.ortrun import relative
from tests.tiny import write_tiny, write_tiny_low_rank

ALL = sorted(path.stem for path in (resource("graphs") / "ops").glob("*.onnxtxt"))
#: Others have attributes, or inputs of other shapes, and tests of their own (test_mixture, test_tt_ops, test_pivot).
OPS = [name for name in ALL if not name.startswith(("MixTLinear", "TTLinear", "Pivot"))]


def text_function(name: str) -> onnx.FunctionProto:
    return onnx.parser.parse_function((resource("graphs") / "ops" / f"{name}.onnxtxt").read_text(encoding="utf-8"))


def call(function: onnx.FunctionProto, *arrays: np.ndarray, **attributes: object) -> np.ndarray:
    names = list(function.input)
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, a.shape) for n, a in zip(names, arrays, strict=True)]
    node = helper.make_node(function.name, names, ["y"], domain="mixt", **attributes)
    graph = helper.make_graph([node], "g", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("mixt", 1)]
    model = helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString())
    return session.run(None, dict(zip(names, arrays, strict=True)))[0]


#: op -> float64 oracle
ORACLES = {
    "LowRankLinear": lambda x, v, u: x @ (v @ u),
    "LowRankLinearBias": lambda x, v, u, bias: x @ (v @ u) + bias,
}


def test_every_op_has_an_oracle() -> None:
    assert sorted(ORACLES) == OPS


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("seq", [1, 7])
@pytest.mark.parametrize("op", OPS)
def test_text_computes_the_oracle(op: str, batch: int, seq: int) -> None:
    rng = np.random.default_rng(batch * 10 + seq)
    arrays = [rng.standard_normal(shape) for shape in ((batch, seq, 13), (13, 5), (5, 17), (17,))]
    arrays = arrays[: len(text_function(op).input)]
    found = call(text_function(op), *(array.astype(np.float32) for array in arrays))
    assert relative(found, ORACLES[op](*arrays)) < 1e-6


def test_exported_models_carry_the_text(tmp_path: Path) -> None:
    base = write_tiny(tmp_path / "base", "qwen2", num_hidden_layers=1)
    export(write_tiny_low_rank(tmp_path / "model", base), tmp_path / "out", verify=False)
    model = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False)
    carried = {function.name: function for function in model.functions}
    assert sorted(carried) == OPS
    for name, function in carried.items():
        expected = text_function(name)
        assert [(n.op_type, list(n.input), list(n.output), n.name) for n in function.node] == [
            (n.op_type, list(n.input), list(n.output), n.name) for n in expected.node
        ]
        assert list(function.input) == list(expected.input) and function.domain == "mixt"


def test_factors_are_never_multiplied_together() -> None:
    for op in ALL:
        constants = set(list(text_function(op).input)[1:])
        for node in text_function(op).node:
            contracted = bool(node.input) and constants.issuperset(node.input)
            assert not contracted, f"{op}: {node.name} contracts weights with weights"
