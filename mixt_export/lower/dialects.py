"""Dialects: which operators a graph may use. What each may contain is data, checked on every written graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from mixt_export.errors import MixtError
from mixt_export.lower.builder import IR_VERSION, MICROSOFT_DOMAIN, MIXT_DOMAIN


@dataclass(frozen=True)
class Dialect:
    """Operators per domain ("*": every operator of the domain), opset, and how batches and the cache are laid out.

    ``norm``: form of the RMS norm, a key of norms.NORMS. ``typed``: every change of dtype is a Cast, values are of
    ``elements`` only, and islands of float32 are possible (TensorRT's strong typing). ``remedies``: operator -> what to
    do where it turns up and is not allowed. ``unread``: operator -> attributes that TensorRT refuses, or may
    not read in its older versions. ``kernels``: linears may be one node for a compiled kernel,
    which plugins of TensorRT 10.9 and later can launch.
    """

    name: str
    opset: int
    operators: Mapping[str, frozenset[str]]
    padding: str
    shared_buffer: bool
    norm: str = "fused"
    typed: bool = False
    ir_version: int = IR_VERSION
    elements: frozenset[ir.DataType] | None = None
    remedies: Mapping[str, str] = field(default_factory=dict)
    unread: Mapping[str, frozenset[str]] = field(default_factory=dict)
    kernels: bool = False


# fmt: off
_STANDARD = frozenset({
    "Add", "And", "Cast", "CastLike", "Concat", "Constant", "CumSum", "Div", "Einsum", "Equal",
    "Expand", "Gather", "GatherND", "Gelu", "Gemm", "Identity", "If", "LayerNormalization", "Less", "LessOrEqual",
    "MatMul", "Max", "Min", "Mul", "Not", "Or", "Pad", "RMSNormalization", "Range", "ReduceSum", "Relu",
    "Reshape", "Shape", "Sigmoid", "Slice", "Split", "Sqrt", "Squeeze", "Sub", "Tanh", "Transpose",
    "Unsqueeze",
})

#: Standard operators up to opset 20 that every TensorRT since 10.0 parses (onnx-tensorrt, docs/operators.md) and that a
#: lowering may use. Not among them: CumSum and the reductions of integers, which 10.3 does not have, and Gelu, which
#: its parser's list of operators lacks.
_TRT_BASIC = frozenset({
    "Add", "And", "Cast", "CastLike", "Concat", "Constant", "Div", "Einsum", "Equal", "Erf", "Expand", "Gather", "Gemm",
    "Identity", "If", "LayerNormalization", "Less", "LessOrEqual", "MatMul", "Max", "Min", "Mul", "Or", "Pad", "Range",
    "ReduceMean", "ReduceSum", "Relu", "Reshape", "Shape", "Sigmoid", "Slice", "Softmax", "Split", "Sqrt", "Squeeze",
    "Sub", "Tanh", "Transpose", "Unsqueeze", "Where",
})
# fmt: on

#: What routing to experts takes besides; all of them in onnx-tensorrt's list since 10.0 (Loop with a trip count).
_EXPERTS = frozenset({"Div", "GatherElements", "ScatterElements", "Softmax", "TopK"})

_TRT_ELEMENTS = frozenset(
    getattr(ir.DataType, name) for name in ("FLOAT", "FLOAT16", "BFLOAT16", "INT32", "INT64", "BOOL")
)
_OPSET_23 = "it is of opset 23, TensorRT 10.3 reads up to 20; write it out, or choose JetPack 7 (--jetpack 7)"
_TRT_REMEDIES = {
    "GroupQueryAttention": "TensorRT has no such plugin; use the dialect's own attention",
    "FusedMatMul": "TensorRT has no such plugin; use MatMul with a transposed weight",
    "MatMulNBits": "TensorRT has no such plugin; use DequantizeLinear and MatMul",
    "NonZero": "its result has a shape that depends on data; compute a mask",
    "CumSum": "TensorRT 10.3 has it for floats only; count with Range and ReduceSum in float32",
    "TensorScatter": "it is of opset 24; join the cache with Concat",
    "Swish": "it is of opset 24; use Sigmoid and Mul",
}

#: Attributes of opsets 15 and 18 that an older parser may not read, and those that TensorRT-RTX refuses.
_NEW_ATTRIBUTES = {"Split": frozenset(["num_outputs"]), "Shape": frozenset(["start", "end"])}
_ATTENTION_ATTRIBUTES = {"Attention": frozenset(["softmax_precision", "softcap", "qk_matmul_output_mode"])}

DIALECTS = {
    dialect.name: dialect
    for dialect in (
        Dialect(
            name="portable",
            opset=23,
            operators={
                "": _STANDARD | _EXPERTS | {"Attention", "DequantizeLinear", "RotaryEmbedding"},
                MIXT_DOMAIN: frozenset("*"),
            },
            padding="left",
            shared_buffer=False,
        ),
        Dialect(
            name="ort",
            opset=23,
            operators={
                "": _STANDARD | _EXPERTS | {"Abs", "Attention", "ReduceMax"},
                MICROSOFT_DOMAIN: frozenset(
                    [
                        "DynamicQuantizeMatMul",
                        "FusedMatMul",
                        "GatherBlockQuantized",
                        "GroupQueryAttention",
                        "MatMulNBits",
                    ]
                ),
                MIXT_DOMAIN: frozenset("*"),
            },
            padding="right",
            shared_buffer=True,
        ),
        Dialect(
            name="trt10",
            opset=20,
            operators={"": _TRT_BASIC | _EXPERTS | {"DequantizeLinear", "Loop"}, MIXT_DOMAIN: frozenset("*")},
            padding="left",
            shared_buffer=False,
            norm="decomposed",
            typed=True,
            ir_version=9,
            elements=_TRT_ELEMENTS,
            remedies=_TRT_REMEDIES | dict.fromkeys(("Attention", "RotaryEmbedding", "RMSNormalization"), _OPSET_23),
            unread=_NEW_ATTRIBUTES,
        ),
        Dialect(
            name="trt11",
            opset=23,
            operators={
                "": _TRT_BASIC
                | _EXPERTS
                | {"DequantizeLinear", "Loop", "Attention", "RotaryEmbedding", "RMSNormalization"},
                MIXT_DOMAIN: frozenset("*"),
            },
            padding="left",
            shared_buffer=False,
            norm="typed",
            typed=True,
            elements=_TRT_ELEMENTS,
            remedies=_TRT_REMEDIES,
            unread=_NEW_ATTRIBUTES | _ATTENTION_ATTRIBUTES,
            kernels=True,
        ),
    )
}


def check_dialect(model: ir.Model, dialect: Dialect) -> None:
    """Every node, function bodies included, is named, unique in its body, and of an operator ``dialect`` allows.

    In a typed dialect also: no body is of a newer opset than the dialect's, every ``mixt`` node has its function in the
    model, every value of the graph has an element type that TensorRT has, and Attention has one output.
    Raises MixtError (internal error: the lowering broke its promise) naming the node and the remedy.
    """
    bodies = [("graph", model.graph.opset_imports, list(model.graph.all_nodes()))]
    bodies += [(f.name, f.opset_imports, list(f.all_nodes())) for f in model.functions.values()]
    for where, opsets, nodes in bodies:
        if opsets.get("", 0) > dialect.opset:
            raise MixtError(
                f"{where}: is written in opset {opsets['']}, the dialect {dialect.name} reads up to {dialect.opset}; "
                f"write it in opset {dialect.opset}."
            )
        seen: set[str] = set()
        for node in nodes:
            _check_node(model, dialect, where, node)
            if not node.name:
                raise MixtError(f"{where}: a {node.op_type} node has no name; name it after what it computes.")
            if node.name in seen:
                raise MixtError(f"{where}: two nodes are called {node.name!r}; names must be unique in a body.")
            seen.add(node.name)


def _check_node(model: ir.Model, dialect: Dialect, where: str, node: ir.Node) -> None:
    allowed = dialect.operators.get(node.domain, frozenset())
    label = f"{where}: node {node.name!r}"
    if "*" not in allowed and node.op_type not in allowed:
        remedy = dialect.remedies.get(node.op_type)
        raise MixtError(
            f"{label} uses {node.domain or 'ai.onnx'}::{node.op_type}, which the dialect {dialect.name} does not "
            f"contain{f': {remedy}' if remedy else ''}."
        )
    if not dialect.typed:
        return
    if node.domain == MIXT_DOMAIN and (node.domain, node.op_type, "") not in model.functions:
        raise MixtError(f"{label} calls mixt::{node.op_type}, whose function is not in the model; add the function.")
    for name in dialect.unread.get(node.op_type, frozenset()) & node.attributes.keys():
        raise MixtError(f"{label} has the attribute {name!r}, which TensorRT does not read; express it without.")
    if node.op_type == "Attention" and len(node.outputs) > 1:
        raise MixtError(f"{label} has {len(node.outputs)} outputs, TensorRT takes one; join the cache with Concat.")
    for value in node.outputs:
        if dialect.elements is not None and value.dtype is not None and value.dtype not in dialect.elements:
            raise MixtError(
                f"{label} makes {value.dtype.short_name()} values, which TensorRT does not have; cast them."
            )
