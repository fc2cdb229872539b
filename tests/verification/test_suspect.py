"""Where an error begins, which tolerance would have passed, what a profile admits: without any model."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from mixt_export.errors import UsageError
from mixt_export.verification.assembling import minimum_tolerance
from mixt_export.verification.checks.tables import _rows
from mixt_export.verification.facts import profile_claims
from mixt_export.verification.graph import feeding, read_constant
from mixt_export.verification.layers import suspect
from mixt_export.verification.result import CheckResult

BAR = [1e-5] * 5


@pytest.mark.parametrize(
    ("errors", "begins"),
    [
        ([2e-7, 3e-7, 1e-2, 2e-2, 2e-2], 2),  # plainly
        ([2e-7, 8e-6, 9e-6, 1.2e-5, 2e-5], 1),  # beyond the bar only after two more blocks
        ([2e-7, 3e-7, 6e-6, 6e-6, 6e-6], 2),  # nowhere beyond the bar
        ([2e-7, 3e-7, 4e-7, 5e-7, 6e-7], None),  # rounding
        ([2e-7, math.inf, math.inf, math.nan, math.inf], 1),
        ([5e-3, 5e-3, 6e-3, 6e-3, 5e-3], 0),
    ],
)
def test_the_error_begins_where_it_grows_most(errors: list[float], begins: int | None) -> None:
    assert suspect(errors, BAR, 0.1) == begins


def test_a_measured_bar_leaves_room_for_rounding() -> None:
    """Each block takes a third of its bar; the fault exceeds the bar by little."""
    bars = [3e-4, 4e-4, 5e-4, 6e-4]
    assert suspect([1e-4, 1.3e-4, 8e-4, 9e-4], bars, 0.4) == 2
    assert suspect([1e-4, 1.3e-4, 1.7e-4, 2e-4], bars, 0.4) is None


def compared(needed: float, tolerance: float, passed: bool) -> CheckResult:
    metrics: dict[str, Any] = {"needed_tolerance": needed, "tolerance": tolerance}
    return CheckResult("x", "X", passed, "" if passed else "failed", metrics=metrics)


def test_a_check_with_a_wider_bar_of_its_own_asks_for_nothing_when_it_passes() -> None:
    usual = compared(1e-6, 1e-5, True)
    assert minimum_tolerance([usual, compared(5e-5, 1e-4, True)], 1e-5) == 1e-6
    assert minimum_tolerance([usual, compared(5e-4, 1e-4, False)], 1e-5) == 5e-4
    assert minimum_tolerance([usual, CheckResult("y", "Y", False, "could not run")], 1e-5) is None


def test_one_wrong_row_is_not_hidden_by_the_others() -> None:
    rng = np.random.default_rng(0)
    table = rng.standard_normal((1000, 64)).astype(np.float32)
    for dtype in ("float32", "float16"):
        stored = table.astype(dtype)
        errors, bars, _ = _rows(stored, table, dtype)
        assert (errors <= bars).all()
        stored[777, 3] += np.asarray(0.1, dtype)
        errors, bars, _ = _rows(stored, table, dtype)
        assert np.flatnonzero(errors > bars).tolist() == [777]
        stored[777, 3] = np.nan
        errors, bars, _ = _rows(stored, table, dtype)
        assert np.flatnonzero(~(errors <= bars)).tolist() == [777]


def manifest(longest: int) -> dict[str, Any]:
    inputs = {
        "input_ids": {"min": [1, 1], "opt": [1, 1], "max": [2, 8]},
        "attention_mask": {"min": [1, 1], "opt": [1, 1], "max": [2, longest + 8]},
        "past_key_values.0.key": {"min": [1, 2, 0, 16], "opt": [1, 2, 4, 16], "max": [2, 2, longest, 16]},
    }
    profiles = [{"name": "all", "inputs": inputs}]
    return {"limits": {"max_seq_len": 32}, "trt": {"max_batch": 2, "max_input_len": 8, "profiles": profiles}}


def test_profiles_must_admit_what_the_folder_promises() -> None:
    for longest, admitted in ((31, True), (30, False)):
        data = manifest(longest)
        claims = dict(profile_claims(data["trt"], data))
        assert claims == {"2 prompts of 8 tokens": True, "a token after 31 positions": admitted}
    data = manifest(31)
    data["trt"]["max_batch"] = 3
    assert not all(admitted for _, admitted in profile_claims(data["trt"], data))
    data["trt"]["profiles"] = [None, {"inputs": {"input_ids": 3}}]
    assert not any(admitted for _, admitted in profile_claims(data["trt"], data))


def test_the_part_of_a_graph_that_feeds_a_value(tmp_path) -> None:
    nodes = [
        helper.make_node("Add", ["x", "a"], ["y"], name="one"),
        helper.make_node("Mul", ["y", "b"], ["z"], name="two"),
        helper.make_node("Mul", ["z", "w"], ["out"], name="three"),
    ]
    constants = [helper.make_tensor(name, TensorProto.FLOAT, [2], [1.0, 2.0]) for name in "ab"]
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xw"]
    inner = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "yz"]
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, [2])
    graph = helper.make_graph(nodes, "g", inputs, [out], constants, value_info=inner)
    part = feeding(helper.make_model(graph), "y").graph
    assert [node.name for node in part.node] == ["one"]
    assert [value.name for value in part.input] == ["x"]
    assert [tensor.name for tensor in part.initializer] == ["a"]
    assert [(value.name, value.type.tensor_type.elem_type) for value in part.output] == [("y", TensorProto.FLOAT)]


def test_a_constant_that_is_cut_off_is_refused(tmp_path) -> None:
    tensor = onnx.TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2, 2])
    for key, value in (("location", "weights"), ("offset", "4"), ("length", "16")):
        tensor.external_data.add(key=key, value=value)
    values = np.arange(5, dtype=np.float32)
    (tmp_path / "weights").write_bytes(values.tobytes())
    assert read_constant(tmp_path, tensor).tolist() == [[1, 2], [3, 4]]
    (tmp_path / "weights").write_bytes(values.tobytes()[:-1])
    with pytest.raises(UsageError, match="ends within weight 'w'"):
        read_constant(tmp_path, tensor)
