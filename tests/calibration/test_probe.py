"""A probe's session runs the operator it stands for, on operands of the shapes it says, and no other arithmetic."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from mixt_export.calibration import measure
from mixt_export.calibration import probe as probes
from mixt_export.calibration.grid import grid
from mixt_export.calibration.probe import Probe, empty, moving, session, timed
from mixt_export.plan.operations import Operation
from mixt_export.progress import SILENT

CASES = {
    "right": (Operation("right", 1, 3, 5, 7, 35), 2, "MatMul", (1, 6, 5), (1, 6, 7)),
    "left": (Operation("left", 2, 9, 5, 7, 35, tokens="batch"), 3, "MatMul", (6, 5, 9), (6, 7, 9)),
    "left, tokens last": (Operation("left", 2, 9, 5, 7, 35), 3, "MatMul", (2, 5, 27), (2, 7, 27)),
    "batched": (Operation("batched", 4, 3, 5, 7, 140), 2, "MatMul", (4, 6, 5), (4, 6, 7)),
    "transpose, one by one": (moving("transpose", 3, 0, 5), 2, "Transpose", (2, 3, 5), (2, 5, 3)),
    "transpose, any": (moving("transpose", 3, 1, 5), 2, "Transpose", (1, 3, 2, 5), (1, 5, 2, 3)),
    "transpose": (moving("transpose", 3, 2, 5), 2, "Transpose", (2, 3, 5, 2), (2, 5, 3, 2)),
    "elementwise": (moving("elementwise", 3, 2, 5), 2, "Add", (1, 2, 30), (1, 2, 30)),
    "pad": (moving("pad", 4, 2, 5), 2, "Pad", (1, 2, 40), (1, 2, 50)),
    "reshape": (moving("reshape", 4, 2, 5), 2, "Reshape", (1, 2, 40), (2, 1, 40)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_session_runs_the_operator(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    operation, tokens, op, source, result = CASES[name]
    monkeypatch.setattr(probes, "_MOST_COPIES", 3)
    seen: list[onnx.ModelProto] = []
    monkeypatch.setattr(
        "onnxruntime.InferenceSession", lambda data, *_, **__: seen.append(onnx.load_from_string(data)) or len(seen)
    )
    _, x = session(Probe(operation, tokens), 1)
    inferred = onnx.shape_inference.infer_shapes(seen[0], strict_mode=True, data_prop=True)
    nodes = [node for node in inferred.graph.node if node.op_type != "Slice"]
    assert {node.op_type for node in nodes} == {op} and len(nodes) == 3
    shapes = {
        info.name: tuple(d.dim_value for d in info.type.tensor_type.shape.dim) for info in inferred.graph.value_info
    }
    assert x.shape == source and x.dtype == np.float32 and {shapes[node.output[0]] for node in nodes} == {result}
    if op == "MatMul":
        assert {w.name: int(np.prod(w.dims)) for w in inferred.graph.initializer if w.name[0] == "w"} == {
            f"w{copy}": operation.weights for copy in range(3)
        }


def test_times_are_positive_and_more_work_takes_longer() -> None:
    small, large = (Probe(Operation("right", 1, 1, size, size, size * size), 16) for size in (16, 512))
    times = []
    for one in (small, large):
        model, x = session(one, 1)
        times.append(min(timed(model, x, 2, 1) for _ in range(3)) / one.copies)
    run, behind = empty(1)
    assert 0 < times[0] < times[1] and run > 0 and behind > 0


def test_every_operator_is_timed_in_every_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    some = grid(0.02)
    monkeypatch.setattr(measure, "_SLICE", 1e-5)
    monkeypatch.setattr(measure, "_PASSES", 1)
    start, times = measure._times(some, 1, SILENT)
    assert 1e-8 < start < 1e-3
    assert len(times) == len(some) == 7 and all(abs(seconds) < 1 for seconds in times)
    assert sum(times) > 0
