"""How much of low rank's roofline gain survives: LowRankLinear at 50 % of the parameters against the dense product.

One layer shape per graph, several distinct copies so that small weights do not all sit in the cache, one thread,
variants interleaved in one process. The roofline gain is the ratio of max(2·MACs/peak, bytes/bandwidth), with peak and
bandwidth measured in the same process.

    python -m benchmarks.low_rank_linear
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from benchmarks.common import interleaved, paired_ratio, publish, timer
from mixt_export.resources import resource

SHAPES = ((576, 576), (576, 1536), (1536, 576), (2048, 2048), (4096, 4096))
ROWS = (1, 16, 128)
FUNCTION = onnx.parser.parse_function((resource("graphs") / "ops" / "LowRankLinear.onnxtxt").read_text())


def session(n_in: int, n_out: int, copies: int, rank: int | None) -> ort.InferenceSession:
    rng = np.random.default_rng(0)
    nodes, weights = [], []
    for copy in range(copies):
        shapes = [("w", (n_out, n_in))] if rank is None else [("v", (n_in, rank)), ("u", (rank, n_out))]
        names = [f"{stem}{copy}" for stem, _ in shapes]
        for name, (_, shape) in zip(names, shapes, strict=True):
            weights.append(numpy_helper.from_array(rng.standard_normal(shape, np.float32), name))
        if rank is None:
            node = helper.make_node("FusedMatMul", ["x", *names], [f"y{copy}"], domain="com.microsoft", transB=1)
        else:
            node = helper.make_node("LowRankLinear", ["x", *names], [f"y{copy}"], domain="mixt")
        nodes.append(node)
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", n_in])],
        [helper.make_tensor_value_info(f"y{copy}", TensorProto.FLOAT, ["rows", n_out]) for copy in range(copies)],
        weights,
    )
    opsets = [helper.make_opsetid(domain, version) for domain, version in (("", 23), ("mixt", 1), ("com.microsoft", 1))]
    model = helper.make_model(graph, opset_imports=opsets, functions=[FUNCTION], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options)


def ceilings() -> tuple[float, float]:
    """(FLOP/s, bytes/s) of one thread: a large product, and a one-row product whose weights come from memory."""
    big = session(4096, 4096, 1, None)
    wide = np.ones((512, 4096), np.float32)
    peak = max(2 * 512 * 4096 * 4096 / timer(big, wide, 1) for _ in range(5))
    row = np.ones((1, 4096), np.float32)
    bandwidth = max(4 * 4096 * 4096 / timer(big, row, 3) for _ in range(8))
    return peak, bandwidth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    peak, bandwidth = ceilings()
    rows_of: dict[str, Any] = {}
    for n_in, n_out in SHAPES:
        rank = n_in * n_out // (2 * (n_in + n_out)) // 16 * 16  # the width of the matrix kernels
        copies = max(1, min(32, (96 << 20) // (4 * n_in * n_out)))
        models = {"dense": session(n_in, n_out, copies, None), "low rank": session(n_in, n_out, copies, rank)}
        for rows in ROWS:
            x = np.random.default_rng(1).standard_normal((rows, n_in), np.float32)
            runs = {name: (lambda m=model, x=x: timer(m, x, 2)) for name, model in models.items()}
            seconds = interleaved(runs, rounds)

            def roof(params: float, rows: int = rows) -> float:
                return max(2 * params * rows / peak, 4 * params / bandwidth)

            gain = roof(n_in * n_out) / roof(rank * (n_in + n_out))
            measured = paired_ratio(seconds["dense"], seconds["low rank"])
            rows_of[f"{n_in}x{n_out} rows {rows}"] = {
                "dense microseconds": round(1e6 * statistics.median(seconds["dense"]) / copies, 1),
                "times faster": measured,
                "roofline gain": round(gain, 3),
                "kept": round(measured["median"] / gain, 3),
            }
    kept = {
        rows: round(statistics.median(v["kept"] for k, v in rows_of.items() if k.endswith(f"rows {rows}")), 3)
        for rows in ROWS
    }
    ceiling = {"GFLOP/s": round(peak / 1e9, 1), "GB/s": round(bandwidth / 1e9, 1)}
    publish("low_rank_linear", {"threads": 1, "ceiling": ceiling, "median kept by rows": kept, "layers": rows_of})


if __name__ == "__main__":
    main()
