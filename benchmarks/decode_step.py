"""A decoding step outside of the weights: the runner's own share of it, and a sum and its norm as one operator or two.

python -m benchmarks.decode_step [FOLDER] [--rounds 5]

``runner``: greedy tokens at one thread; microseconds of a step, and of what of it is not ONNX Runtime's run (tokens and
masks made and bound, logits copied, the likeliest found), medians over all steps. The folder is an int4 export of
SmolLM2 rounded to nearest unless one is named. ``norm``: Add and RMSNormalization beside
SkipSimplifiedLayerNormalization, which GenAI's builder writes: relative L2 error of 200 tokens against float64, and
microseconds of the thread, runs in turn.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from benchmarks.common import feeds_timer, int4_sample, interleaved, paired_ratio, publish

PROMPT, NEW = 128, 100
WIDTHS = (576, 4096)
TOKENS, EPSILON = 200, 1e-5


def runner(folder: Path, rounds: int) -> dict[str, float]:
    """Microseconds of a step and of its part outside of the run; the first round does not count."""
    from mixt_export.runtime import load_runtime

    model: Any = load_runtime("ort").Model(folder, threads=1)
    inside: list[float] = []
    run = model._run

    def timed(binding: Any) -> None:
        began = time.perf_counter()
        run(binding)
        inside.append(time.perf_counter() - began)

    model._run = timed
    ids = [int(token) for token in np.random.default_rng(0).integers(1000, 40000, PROMPT)]
    steps, outside = [], []
    for round_ in range(rounds + 1):
        generation = model.generate(ids, NEW, stop=())
        next(generation)
        inside.clear()
        began = time.perf_counter()
        for _ in generation:
            now = time.perf_counter()
            if round_:
                steps.append(now - began)
                outside.append(now - began - inside[-1])
            began = time.perf_counter()
    return {
        "step_us": round(1e6 * statistics.median(steps), 1),
        "outside_us": round(1e6 * statistics.median(outside), 1),
    }


def norm(width: int, rounds: int) -> dict[str, Any]:
    """Errors of both ways, and how many times as long as two operators the one takes, at one token and at TOKENS."""
    rng = np.random.default_rng(0)
    feeds = {name: rng.standard_normal((1, TOKENS, width)).astype(np.float32) for name in ("a", "b")}
    feeds["scale"] = rng.standard_normal(width).astype(np.float32)
    exact = feeds["a"].astype(np.float64) + feeds["b"]
    exact *= feeds["scale"] / np.sqrt((exact * exact).mean(axis=-1, keepdims=True) + EPSILON)
    sessions = {"two": _session(width, joined=False), "one": _session(width, joined=True)}
    found: dict[str, Any] = {
        name: float(np.linalg.norm(session.run(["y"], feeds)[0] - exact) / np.linalg.norm(exact))
        for name, session in sessions.items()
    }
    single = {name: value[:, :1] if value.ndim == 3 else value for name, value in feeds.items()}
    for label, given, repeats in (("1 token", single, 500), (f"{TOKENS} tokens", feeds, 20)):
        runs = {name: partial(feeds_timer, session, given, repeats) for name, session in sessions.items()}
        spent = interleaved(runs, max(rounds, 9))
        found[label] = {
            **{f"{name}_us": round(1e6 * statistics.median(values), 2) for name, values in spent.items()},
            "times as fast": paired_ratio(spent["two"], spent["one"]),
        }
    return found


def _session(width: int, *, joined: bool) -> Any:
    import onnxruntime as ort

    given = [("a", [1, "tokens", width]), ("b", [1, "tokens", width]), ("scale", [width])]
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in given]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, "tokens", width]) for name in ("y", "sum")]
    if joined:
        nodes = [
            helper.make_node(
                "SkipSimplifiedLayerNormalization", ["a", "b", "scale"], ["y", "", "", "sum"], domain="com.microsoft",
                epsilon=EPSILON,
            )
        ]  # fmt: skip
    else:
        nodes = [
            helper.make_node("Add", ["a", "b"], ["sum"]),
            helper.make_node("RMSNormalization", ["sum", "scale"], ["y"], axis=-1, epsilon=EPSILON),
        ]
    graph = helper.make_graph(nodes, "norm", inputs, outputs)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.folder or int4_sample(Path(scratch))
        result = {"runner": runner(folder, given.rounds)}
    publish("decode_step", {**result, "norm": {str(width): norm(width, given.rounds) for width in WIDTHS}})


if __name__ == "__main__":
    main()
