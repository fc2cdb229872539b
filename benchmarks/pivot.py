"""What pivot rows gain over the two factors of the same rank: LowRankLinear against PivotLinear, and the dense product.

One layer shape per graph, several distinct copies so that small weights do not all sit in the cache, one thread, thread
CPU time, variants interleaved in one process. ``kept`` is the share of the dense numbers that the two factors hold.

    python -m benchmarks.pivot
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from benchmarks.common import interleaved, paired_ratio, publish, timer
from mixt_export.resources import resource

SHAPES = ((576, 576), (576, 1536), (1536, 576), (2048, 2048), (4096, 4096))
KEPT = (0.5, 0.8, 0.9)
ROWS = (1, 16, 128)
BYTES = 96 << 20
"""Of the dense matrices of one graph: more than fits into a cache."""


def function(name: str) -> onnx.FunctionProto:
    return onnx.parser.parse_function((resource("graphs") / "ops" / f"{name}.onnxtxt").read_text(encoding="utf-8"))


def session(operator: str, n_in: int, n_out: int, rank: int, copies: int) -> ort.InferenceSession:
    """``copies`` nodes of ``operator`` on one input; of the pivots which rows they are is random."""
    rng = np.random.default_rng(0)
    others = n_out - rank
    shapes = {
        "MatMul": [(n_in, n_out)],
        "LowRankLinear": [(n_in, rank), (rank, n_out)],
        "PivotLinear": [(n_in, rank), (rank, others)],
    }[operator]
    nodes, weights = [], []
    for copy in range(copies):
        arrays = [rng.random(shape, np.float32) - np.float32(0.5) for shape in shapes]
        if operator == "PivotLinear":
            arrays.append(rng.permutation(n_out).astype(np.int32))
        names = [f"w{copy}_{index}" for index in range(len(arrays))]
        weights += [numpy_helper.from_array(array, name) for array, name in zip(arrays, names, strict=True)]
        domain = "" if operator == "MatMul" else "mixt"
        nodes.append(helper.make_node(operator, ["x", *names], [f"y{copy}"], domain=domain))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "rows", n_in])],
        [
            helper.make_tensor_value_info(f"y{copy}", TensorProto.FLOAT, ["batch", "rows", n_out])
            for copy in range(copies)
        ],
        weights,
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("mixt", 1)]
    functions = [] if operator == "MatMul" else [function(operator)]
    model = helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    layers: dict[str, Any] = {}
    ratios: dict[str, list[float]] = {}
    for n_in, n_out in SHAPES:
        copies = max(1, min(32, BYTES // (4 * n_in * n_out)))
        for kept in KEPT:
            rank = int(kept * n_in * n_out / (n_in + n_out)) // 16 * 16  # the width of the matrix kernels
            operators = ("MatMul", "LowRankLinear", "PivotLinear")
            models = {operator: session(operator, n_in, n_out, rank, copies) for operator in operators}
            for rows in ROWS:
                x = np.random.default_rng(1).standard_normal((1, rows, n_in), np.float32)
                runs: dict[str, Callable[[], float]] = {
                    name: partial(timer, model, x, 1) for name, model in models.items()
                }
                seconds = interleaved(runs, rounds)
                gain = paired_ratio(seconds["LowRankLinear"], seconds["PivotLinear"])
                ratios.setdefault(f"kept {kept} rows {rows}", []).append(gain["median"])
                layers[f"{n_in}x{n_out} kept {kept} rows {rows}"] = {
                    "rank": rank,
                    "numbers": {
                        "low rank": rank * (n_in + n_out),
                        "pivot": rank * (n_in + n_out) - rank * rank,
                        "dense": n_in * n_out,
                    },
                    "microseconds": {
                        name: round(1e6 * statistics.median(found) / copies, 1) for name, found in seconds.items()
                    },
                    "times faster than low rank": gain,
                    "times faster than dense": paired_ratio(seconds["MatMul"], seconds["PivotLinear"]),
                }
    medians = {what: round(statistics.median(found), 3) for what, found in ratios.items()}
    publish("pivot", {"threads": 1, "rounds": rounds, "median times faster than low rank": medians, "layers": layers})


if __name__ == "__main__":
    main()
