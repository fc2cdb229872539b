"""How much of the roofline gain one row can keep: a form against its matrix products alone.

For every tensor train and Tucker from 2048x2048 up, the form chosen for one row; its products without anything between
them, each with an input of its own; and the same with all of them as right products, as if permuting the activation
took no time. Against the dense matrix, in one process, one thread, thread CPU time, interleaved. What the products
alone do not keep, no order of the graph's nodes can.

    python -m benchmarks.planner_floor [--only '4096x4096']
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from benchmarks.common import RESULTS, interleaved, machine
from benchmarks.planner_cases import linears
from benchmarks.planner_judge import ratio
from benchmarks.planner_session import copies_of, session
from mixt_export.calibration.probe import values
from mixt_export.plan import CPU, Form, forms_of, seconds
from mixt_export.plan.operations import Operation

_SLICE = 5e-3
"""Seconds a model runs at least in one round."""


def products(form: Form, *, right: bool) -> tuple[ort.InferenceSession, dict[str, Any]]:
    """A session of the products of `copies_of` linears, and its inputs: one activation for each step."""
    steps = [step for step in form.operations if step.kind in ("right", "left")]
    weights = [numpy_helper.from_array(np.array([i]), f"i{i}") for i in range(3)]
    nodes, outputs = [], []
    for copy in range(copies_of(form)):
        for index, step in enumerate(steps):
            name = f"{copy}_{index}"
            left = step.kind == "left" and not right
            shape = (step.columns, step.inner) if left else (step.inner, step.columns)
            weights.append(numpy_helper.from_array(values(shape, 31 * copy + index), f"w{name}"))
            operands = [f"w{name}", f"x{index}"] if left else [f"x{index}", f"w{name}"]
            nodes.append(helper.make_node("MatMul", operands, [f"z{name}"]))
            nodes.append(helper.make_node("Slice", [f"z{name}", "i0", "i1", "i2"], [f"y{name}"]))
            outputs.append(helper.make_tensor_value_info(f"y{name}", TensorProto.FLOAT, None))
    inputs = [helper.make_tensor_value_info(f"x{i}", TensorProto.FLOAT, [None] * 4) for i in range(len(steps))]
    graph = helper.make_graph(nodes, "g", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    made = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return made, {f"x{i}": values(_shape(step, right), i) for i, step in enumerate(steps)}


def _shape(step: Operation, right: bool) -> tuple[int, ...]:
    if step.kind == "left" and not right:
        return (1, step.batch, step.inner, step.rows)
    return (1, 1, step.batch * step.rows, step.inner)


def _timed(model: ort.InferenceSession, feeds: dict[str, Any], repeats: int, copies: int) -> float:
    began = time.thread_time()
    for _ in range(repeats):
        model.run(None, feeds)
    return (time.thread_time() - began) / repeats / copies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="2048x2048|4096x4096", help="regular expression on the cases' names")
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    reached = json.loads((RESULTS / "planner.json").read_text())["roofline"]
    found: dict[str, dict[str, float]] = {}
    for name, linear in linears():
        large = min(linear.in_features, linear.out_features) >= 2048
        if not (large and name.startswith(("tt", "tucker")) and re.search(options.only, name)):
            continue
        forms = forms_of(linear)
        form, dense = min(forms, key=lambda form: (seconds(form, 1, CPU), form.elements)), forms[-1]
        if form.dense:
            continue
        whole = {"x": values((1, 1, linear.in_features), 1)}
        models = {
            "form": (session(linear, form), whole, copies_of(form)),
            "products": (*products(form, right=False), copies_of(form)),
            "right products": (*products(form, right=True), copies_of(form)),
            "dense": (session(linear, dense), whole, copies_of(dense)),
        }
        runs: dict[str, Callable[[], float]] = {}
        for key, (model, feeds, copies) in models.items():
            once = min(_timed(model, feeds, 1, 1), _timed(model, feeds, 1, 1))
            runs[key] = partial(_timed, model, feeds, max(1, min(20, round(_SLICE / once))), copies)
        taken = interleaved(runs, options.rounds)
        gain = _roof(dense, reached) / _roof(form, reached)
        found[name] = {
            key: round(ratio(taken["dense"], times) / gain, 3) for key, times in taken.items() if key != "dense"
        }
        print(name, form.name, found[name], file=sys.stderr, flush=True)
    kept = {key: round(statistics.median(one[key] for one in found.values()), 3) for key in next(iter(found.values()))}
    result = {"benchmark": "planner_floor", "threads": 1, "median kept": kept, "kept": found, **machine()}
    (RESULTS / "planner_floor.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(kept))


def _roof(form: Form, reached: dict[str, float]) -> float:
    return max(2 * form.macs / reached["GFLOP/s"], 4 * form.elements / reached["GB/s"])


if __name__ == "__main__":
    main()
