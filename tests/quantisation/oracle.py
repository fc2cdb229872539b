"""Blocks of integers in plain float64 loops; shares no code with what it tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from mixt_export.runtime import load_runtime


def bytes_of(codes: NDArray[np.uint8], bits: int, group: int) -> NDArray[np.uint8]:
    """(N, blocks, group · bits / 8) as the operator's documentation says it: the first code in the low half."""
    rows, columns = codes.shape
    blocks = (columns + group - 1) // group
    packed = np.zeros((rows, blocks, group * bits // 8), np.uint8)
    for n in range(rows):
        for k in range(blocks * group):
            code = int(codes[n, k]) if k < columns else 1 << (bits - 1)
            where = k % group
            if bits == 8:
                packed[n, k // group, where] = code
            else:
                packed[n, k // group, where // 2] |= code << (4 * (where % 2))
    return packed


def matrix_of(codes: NDArray[np.uint8], scales: NDArray[np.float32], bits: int, group: int) -> NDArray[np.float64]:
    """(code - 2^(bits-1)) · scale, element by element."""
    values = np.zeros(codes.shape, np.float64)
    for n, k in np.ndindex(*codes.shape):
        values[n, k] = (int(codes[n, k]) - (1 << (bits - 1))) * float(scales[n, k // group])
    return values


def rounded_rows(x: NDArray[np.float32], group: int) -> NDArray[np.float64]:
    """Rows (M, K) with each block rounded to 127 steps of its largest magnitude."""
    found = np.zeros(x.shape, np.float64)
    for m in range(len(x)):
        for begin in range(0, x.shape[1], group):
            block = x[m, begin : begin + group].astype(np.float64)
            largest = np.abs(block).max()
            if largest > 0:
                found[m, begin : begin + group] = np.rint(block * 127 / largest) * largest / 127
    return found


def product(
    x: NDArray[np.float32],
    packed: NDArray[np.uint8],
    scales: NDArray[np.float32],
    columns: int,
    bits: int,
    group: int,
    level: int,
) -> NDArray[np.float32]:
    """x (batch, seq, K) through com.microsoft::MatMulNBits in ONNX Runtime."""
    import onnxruntime as ort

    rows = len(packed)
    attributes: dict[str, Any] = {"K": columns, "N": rows, "bits": bits, "block_size": group, "accuracy_level": level}
    node = helper.make_node("MatMulNBits", ["x", "B", "s"], ["y"], domain="com.microsoft", **attributes)
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "seq", columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "seq", rows])],
        [numpy_helper.from_array(packed, "B"), numpy_helper.from_array(scales, "s")],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


def rounded_call(x: NDArray[Any]) -> NDArray[np.float64]:
    """All of ``x`` at 256 codes from its least to its largest number, 0 among them: DynamicQuantizeLinear."""
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    scale = (high - low) / 255 or 1.0
    zero = np.rint(-low / scale)
    found = np.zeros(x.shape, np.float64)
    for place in np.ndindex(*x.shape):
        code = min(max(np.rint(float(x[place]) / scale) + zero, 0), 255)
        found[place] = (code - zero) * scale
    return found


def dynamic_product(
    x: NDArray[np.float32], codes: NDArray[np.int8], scales: NDArray[np.float32]
) -> NDArray[np.float32]:
    """x (batch, seq, K) through com.microsoft::DynamicQuantizeMatMul with int8 codes (K, N) in ONNX Runtime."""
    import onnxruntime as ort

    node = helper.make_node("DynamicQuantizeMatMul", ["x", "B", "s"], ["y"], domain="com.microsoft")
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "seq", len(codes)])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "seq", len(scales)])],
        [numpy_helper.from_array(codes, "B"), numpy_helper.from_array(scales, "s")],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    load_runtime("ort").sum_exactly(options)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])
