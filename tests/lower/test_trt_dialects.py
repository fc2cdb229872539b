"""What a TensorRT graph may hold: injected faults are named, types agree at every operator, islands are where asked."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx.inliner
import onnx_ir as ir
import pytest
from onnx import TensorProto

from mixt_export.errors import MixtError
from mixt_export.lower.dialects import DIALECTS, check_dialect
from mixt_export.targets import plan_export
from mixt_export.targets.trt import TrtOptions
from tests.tiny import write_tiny, write_tiny_low_rank, write_tiny_mixt

JETPACK = {"trt10": 6, "trt11": 7}
FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16}


def lowered(folder: Path, dialect: str, dtype: str = "fp16", islands: tuple[str, ...] = ()) -> ir.Model:
    trt = TrtOptions(jetpack=JETPACK[dialect], islands=islands)
    return plan_export(folder, target="trt", dtype=dtype, trt=trt).lowered.model


@pytest.fixture(scope="module")
def low_rank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("trt")
    return write_tiny_low_rank(root / "model", write_tiny(root / "base", "qwen3", num_hidden_layers=1))


def replaced(model: ir.Model, name: str, op_type: str, domain: str = "") -> ir.Model:
    """The same graph with the operator of one node changed."""
    node = next(node for node in model.graph if node.name == name)
    node.op_type, node.domain = op_type, domain
    return model


def with_attribute(model: ir.Model, name: str, attribute: ir.Attr) -> ir.Model:
    """The same graph with an attribute more at one node."""
    next(node for node in model.graph if node.name == name).attributes.add(attribute)
    return model


FAULTS = {
    "microsoft": (
        "trt11",
        lambda m: replaced(m, "/model/layers.0/self_attn/Attention", "GroupQueryAttention", "com.microsoft"),
        r"/model/layers.0/self_attn/Attention.*com.microsoft::GroupQueryAttention.*trt11.*no such plugin",
    ),
    "opset 23 in trt10": (
        "trt10",
        lambda m: replaced(m, "/model/layers.0/self_attn/Softmax", "Attention"),
        r"self_attn/Softmax.*ai.onnx::Attention.*trt10.*opset 23.*--jetpack 7",
    ),
    "unknown operator": (
        "trt11",
        lambda m: replaced(m, "/model/layers.0/mlp/Mul", "NonZero"),
        r"/mlp/Mul.*NonZero.*depends on data",
    ),
    "two nodes of one name": (
        "trt11",
        lambda m: setattr(m.graph[0], "name", m.graph[1].name) or m,
        "two nodes are called",
    ),
    "nameless body node": (
        "trt10",
        lambda m: setattr(next(iter(m.functions.values()))[0], "name", None) or m,
        r"LowRankLinear: a MatMul node has no name",
    ),
    "new body": (
        "trt10",
        lambda m: next(iter(m.functions.values())).opset_imports.update({"": 23}) or m,
        r"LowRankLinear: is written in opset 23, the dialect trt10 reads up to 20",
    ),
    "body operator": (
        "trt10",
        lambda m: setattr(next(iter(m.functions.values()))[0], "op_type", "FusedMatMul") or m,
        r"LowRankLinear: node 'down' uses ai.onnx::FusedMatMul.*transposed weight",
    ),
    "missing body": (
        "trt10",
        lambda m: m.functions.clear() or m,
        r"q_proj.*calls mixt::LowRankLinear.*add the function",
    ),
    "attribute of new parsers": (
        "trt10",
        lambda m: with_attribute(m, "/model/layers.0/self_attn/q_rotary/halves", ir.AttrInt64("num_outputs", 2)),
        r"q_rotary/halves.*attribute 'num_outputs'",
    ),
    "softmax precision": (
        "trt11",
        lambda m: with_attribute(m, "/model/layers.0/self_attn/Attention", ir.AttrInt64("softmax_precision", 1)),
        r"self_attn/Attention.*'softmax_precision'",
    ),
    "foreign type": (
        "trt11",
        lambda m: setattr(m.graph[3].outputs[0], "dtype", ir.DataType.DOUBLE) or m,
        "makes f64 values",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named_with_a_remedy(low_rank: Path, fault: str) -> None:
    dialect, inject, text = FAULTS[fault]
    model = lowered(low_rank, dialect)
    check_dialect(model, DIALECTS[dialect])
    with pytest.raises(MixtError, match=text):
        check_dialect(inject(model), DIALECTS[dialect])


def test_attention_with_a_cache_of_its_own_is_refused(low_rank: Path) -> None:
    model = lowered(low_rank, "trt11")
    attention = next(node for node in model.graph if node.op_type == "Attention")
    attention.resize_outputs(3)
    with pytest.raises(MixtError, match="3 outputs"):
        check_dialect(model, DIALECTS["trt11"])


def mixed(model: ir.Model) -> list[str]:
    """Nodes whose floating operands differ in type; Cast and what reads shapes excepted."""
    proto = ir.serde.serialize_model(model)
    versions = {entry.domain: entry.version for entry in proto.opset_import}
    for function in proto.functions:
        for entry in function.opset_import:
            entry.version = versions.get(entry.domain, entry.version)
    graph = onnx.shape_inference.infer_shapes(onnx.inliner.inline_local_functions(proto)).graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for value in (*graph.input, *graph.output, *graph.value_info):
        types[value.name] = value.type.tensor_type.elem_type
    wrong = []
    for node in graph.node:
        found = {types[name] for name in node.input if name} & FLOATS
        if node.op_type not in ("Cast", "CastLike") and len(found) > 1:
            wrong.append(node.name)
    return wrong


ISLANDS = (
    "attention.0",
    "model.layers.0.self_attn.q_proj=3",
    "model.layers.0.self_attn.k_proj",
    "model.layers.0.mlp.up_proj",
    "model.layers.0.mlp.down_proj",
    "lm_head=2",
)


@pytest.mark.parametrize("dialect", JETPACK)
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("islands", [(), ("residual",), ISLANDS], ids=["plain", "residual", "many"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen2"])
def test_types_agree_at_every_operator(tmp_path: Path, family: str, islands: tuple, dtype: str, dialect: str) -> None:
    base = write_tiny(tmp_path / "base", family, num_hidden_layers=1)
    folder = write_tiny_mixt(tmp_path / "model", base, include=lambda name: not name.endswith("o_proj"))
    assert mixed(lowered(folder, dialect, dtype, islands)) == []


def test_the_type_check_sees_a_mixture(low_rank: Path) -> None:
    model = lowered(low_rank, "trt10")
    cast = next(node for node in model.graph if node.op_type == "Cast" and "Softmax" in node.name)
    for user in list(cast.outputs[0].uses()):
        user.node.replace_input_with(user.idx, cast.inputs[0])
    assert mixed(model)


def test_norms_and_softmax_are_float32(low_rank: Path) -> None:
    for dialect in JETPACK:
        nodes = {node.name: node for node in lowered(low_rank, dialect, "fp16").graph}
        statistics = [node for node in nodes.values() if node.op_type in ("ReduceMean", "RMSNormalization", "Softmax")]
        assert len(statistics) == (6 if dialect == "trt10" else 5)  # three norms, two head norms
        assert {node.outputs[0].dtype for node in statistics} == {ir.DataType.FLOAT}
