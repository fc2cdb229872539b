"""One operator in an ONNX Runtime session, as often as it takes distinct weights to leave the caches; its time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper, numpy_helper

from mixt_export.plan.cost import operation_seconds
from mixt_export.plan.devices import NUMBER
from mixt_export.plan.operations import Kind, Operation

_OPSET, _IR_VERSION = 20, 10
_WEIGHT_BYTES = 16 << 20
"""Bytes of distinct weights a session reads in one run: more than a second-level cache holds."""

_MOST_COPIES = 64

_CHAINS = 32

_RUN = 2e-2
"""Seconds a run may take: where an operator's arithmetic takes that long, where its weights lie matters little."""

Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Probe:
    """``operation`` for ``tokens`` tokens.

    Transposes exchange the axes of a matrix (rows, columns) per token whose entries are ``inner`` numbers, with
    ``inner`` 0 numbers one by one; with 1 they exchange the axes of a matrix (rows, columns) of rows of tokens.
    Elementwise ones add two activations, pads add a fourth to the features.
    """

    operation: Operation
    tokens: int

    @property
    def copies(self) -> int:
        """How many operators with weights of their own the session holds."""
        weights = max(1, NUMBER * self.operation.weights)
        run = int(_RUN / operation_seconds(self.operation, self.tokens))
        return max(1, min(_MOST_COPIES, _WEIGHT_BYTES // weights, run))


def moving(kind: Kind, rows: int, inner: int, columns: int) -> Operation:
    """An operator that moves rows · inner · columns numbers per token: read once and written once (added: three)."""
    size = rows * max(1, inner) * columns
    return Operation(kind, rows=rows, inner=inner, columns=columns, moved=(3 if kind == "elementwise" else 2) * size)


def session(probe: Probe, threads: int) -> tuple[Any, Array]:
    """The session of ``probe`` and its input: every output is read by a slice of a few numbers, as a model would."""
    operation, tokens = probe.operation, probe.tokens
    shape, made = _GRAPHS[operation.kind](operation, tokens)
    nodes, weights = [], [numpy_helper.from_array(np.array([i]), f"i{i}") for i in range(3)]
    for copy in range(probe.copies):
        found, named = made(copy)
        nodes += found
        weights += [numpy_helper.from_array(array, name) for name, array in named.items()]
    return _open(nodes, weights, shape, probe.copies, threads), values(shape, 1)


def _open(nodes: list[Any], weights: list[Any], shape: Sequence[int], copies: int, threads: int) -> Any:
    import onnxruntime

    outputs = []
    for copy in range(copies):
        nodes.append(helper.make_node("Slice", [f"z{copy}", "i0", "i1", "i2"], [f"y{copy}"]))
        outputs.append(helper.make_tensor_value_info(f"y{copy}", TensorProto.FLOAT, None))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, list(shape))
    graph = helper.make_graph(nodes, "probe", [x], outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Optimised, equal operators would run once for all copies, and a Transpose would permute only what the slice keeps.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


_Made = Callable[[int], tuple[list[Any], dict[str, Array]]]


def _right(operation: Operation, tokens: int) -> tuple[Sequence[int], _Made]:
    def made(copy: int) -> tuple[list[Any], dict[str, Array]]:
        node = helper.make_node("MatMul", ["x", f"w{copy}"], [f"z{copy}"])
        return [node], {f"w{copy}": values((operation.inner, operation.columns), copy)}

    return (1, tokens * operation.rows, operation.inner), made


def _left(operation: Operation, tokens: int) -> tuple[Sequence[int], _Made]:
    def made(copy: int) -> tuple[list[Any], dict[str, Array]]:
        node = helper.make_node("MatMul", [f"w{copy}", "x"], [f"z{copy}"])
        return [node], {f"w{copy}": values((operation.columns, operation.inner), copy)}

    if operation.tokens == "rows":
        return (operation.batch, operation.inner, tokens * operation.rows), made
    return (tokens * operation.batch, operation.inner, operation.rows), made


def _batched(operation: Operation, tokens: int) -> tuple[Sequence[int], _Made]:
    def made(copy: int) -> tuple[list[Any], dict[str, Array]]:
        node = helper.make_node("MatMul", ["x", f"w{copy}"], [f"z{copy}"])
        return [node], {f"w{copy}": values((operation.batch, operation.inner, operation.columns), copy)}

    return (operation.batch, tokens * operation.rows, operation.inner), made


def _transpose(operation: Operation, tokens: int) -> tuple[Sequence[int], _Made]:
    rows, columns, inner = operation.rows, operation.columns, operation.inner
    shapes: dict[int, tuple[list[int], list[int]]] = {
        0: ([tokens, rows, columns], [0, 2, 1]),
        1: ([1, rows, tokens, columns], [0, 3, 2, 1]),
    }
    shape, perm = shapes.get(inner, ([tokens, rows, columns, inner], [0, 2, 1, 3]))

    def made(copy: int) -> tuple[list[Any], dict[str, Array]]:
        return [helper.make_node("Transpose", ["x"], [f"z{copy}"], perm=perm)], {}

    return shape, made


def _elementwise(operation: Operation, tokens: int) -> tuple[Sequence[int], _Made]:
    size = operation.rows * operation.inner * operation.columns

    def made(copy: int) -> tuple[list[Any], dict[str, Array]]:
        return [helper.make_node("Add", ["x", "x" if copy == 0 else f"z{copy - 1}"], [f"z{copy}"])], {}

    return (1, tokens, size), made


def _pad(operation: Operation, tokens: int) -> tuple[Sequence[int], _Made]:
    size = operation.rows * operation.inner * operation.columns
    bounds = np.array([0, 0, 0, 0, 0, size // 4])

    def made(copy: int) -> tuple[list[Any], dict[str, Any]]:
        return [helper.make_node("Pad", ["x", f"w{copy}"], [f"z{copy}"])], {f"w{copy}": bounds}

    return (1, tokens, size), made


def _reshape(operation: Operation, tokens: int) -> tuple[Sequence[int], _Made]:
    size = operation.rows * operation.inner * operation.columns

    def made(copy: int) -> tuple[list[Any], dict[str, Any]]:
        return [helper.make_node("Reshape", ["x", f"w{copy}"], [f"z{copy}"])], {f"w{copy}": np.array([tokens, 1, size])}

    return (1, tokens, size), made


_GRAPHS: dict[str, Callable[[Operation, int], tuple[Sequence[int], _Made]]] = {
    "right": _right,
    "left": _left,
    "batched": _batched,
    "transpose": _transpose,
    "elementwise": _elementwise,
    "pad": _pad,
    "reshape": _reshape,
}


@lru_cache(maxsize=1)
def _pool() -> Array:
    return np.random.default_rng(0).standard_normal(1 << 20, np.float32)


def values(shape: Sequence[int], seed: int) -> Array:
    """Normal numbers, repeated from a pool: only their not being zero or denormal matters to a time."""
    pool, size = _pool(), int(np.prod(shape))
    start = 7919 * seed % (len(pool) // 2)
    if start + size <= len(pool):
        return pool[start : start + size].reshape(shape)
    return np.resize(pool[start:], size).reshape(shape)


def timed(model: Any, x: Array, repeats: int, threads: int) -> float:
    """Seconds of one run: CPU time of this thread where it is the only one, else wall time."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    began = clock()
    for _ in range(repeats):
        model.run(None, {"x": x})
    return (clock() - began) / repeats


def node(threads: int) -> float:
    """Seconds to start an operator where operators of several kinds take turns, as they do in a model.

    Copies of one probe find their code in the caches: the constants fitted to them make starting look too cheap.
    """
    shapes = {"split": np.array([1, 4, 8, 8]), "joined": np.array([1, 4, 64])}
    weights = [numpy_helper.from_array(array, name) for name, array in shapes.items()]
    weights += [numpy_helper.from_array(np.array([i]), f"i{i}") for i in range(3)]
    nodes = []
    for copy in range(_CHAINS):
        weights.append(numpy_helper.from_array(values((8, 8), copy), f"w{copy}"))
        nodes += [
            helper.make_node("Reshape", ["x", "split"], [f"a{copy}"]),
            helper.make_node("Transpose", [f"a{copy}"], [f"b{copy}"], perm=[0, 1, 3, 2]),
            helper.make_node("MatMul", [f"b{copy}", f"w{copy}"], [f"c{copy}"]),
            helper.make_node("Reshape", [f"c{copy}", "joined"], [f"d{copy}"]),
            helper.make_node("Add", [f"d{copy}", "x"], [f"z{copy}"]),
        ]
    each = len(nodes) + _CHAINS  # slices are operators too
    model, x = _open(nodes, weights, (1, 4, 64), _CHAINS, threads), values((1, 4, 64), 0)
    timed(model, x, 5, threads)
    return min(timed(model, x, 5, threads) for _ in range(9)) / each


def empty(threads: int) -> tuple[float, float]:
    """Seconds to start a run, and of the one Slice that stands behind every probed operator."""
    times = []
    for copies in (1, 65):
        weights = [numpy_helper.from_array(np.array([i]), f"i{i}") for i in range(3)]
        nodes = [helper.make_node("Slice", ["x", "i0", "i1", "i2"], [f"z{copy}"]) for copy in range(copies)]
        model, x = _open(nodes, weights, (1, 4, 64), copies, threads), values((1, 4, 64), 0)
        timed(model, x, 5, threads)
        times.append(min(timed(model, x, 10, threads) for _ in range(9)))
    each = (times[1] - times[0]) / 128
    return times[0] - 2 * each, each
