from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mixt_export.progress import SILENT
from mixt_export.verification import CheckResult, VerifyOptions, verifier
from mixt_export.verification.assembling import minimum_tolerance
from mixt_export.verification.checks import CHECKS, Check
from mixt_export.verification.context import Context
from mixt_export.verification.gate import OVERFLOW_TOLERANCE, DtypeCost, dtype_gate, float32_gate
from mixt_export.verification.graph import instrument, open_graph
from mixt_export.verification.layers import LayerErrors
from mixt_export.verification.metrics import LogitsComparison
from mixt_export.verification.session import ExportedRunner, RunFailed


def test_a_check_that_the_runtime_refuses_has_failed(model: Path, exported: Path) -> None:
    def refuse(_context: Context) -> CheckResult:
        raise RunFailed("no kernel for Mystery")

    context = Context(exported, model, VerifyOptions(threads=1), SILENT)
    result = verifier._run(Check("odd", "Odd", refuse, lambda _context: True), context)
    assert not result.passed
    assert "no kernel for Mystery" in result.reason
    assert minimum_tolerance([result], 1e-5) is None


def test_logits_of_another_shape_are_a_failure_and_no_crash(exported: Path) -> None:
    """A graph that picks too many positions behind the last block."""
    graph = open_graph(exported)
    runner = ExportedRunner(replace(graph, proto=instrument(graph)), threads=1)
    with pytest.raises(RunFailed, match=r"its logits are of shape \(1, 3, \d+\), expected \(1, 1, 'vocabulary'\)"):
        runner.full(np.array([1, 2, 3], np.int64))


def test_the_largest_needed_tolerance_is_the_minimum_that_passes() -> None:
    def result(needed: float) -> CheckResult:
        return CheckResult("a", "A", True, metrics={"needed_tolerance": needed, "tolerance": 1.0})

    other = CheckResult("b", "B", True, metrics={"constants": 5})
    assert minimum_tolerance([result(0.1), other, result(0.3)], 1.0) == 0.3
    assert minimum_tolerance([result(0.1), result(math.inf)], 1.0) is None


def test_check_names_are_distinct_and_titled() -> None:
    assert len({check.name for check in CHECKS}) == len(CHECKS)
    assert all(check.title and len(check.title) <= 28 for check in CHECKS)


def cost(rel_l2: float, layers: list[float], flips: int = 0) -> DtypeCost:
    return DtypeCost("float16", 100, rel_l2, 0.9999, 1e-6, flips, 0, layers)


def test_gates() -> None:
    assert float32_gate(2, None).tolerance == 1e-5
    assert float32_gate(2, 1e-3).layers == [1e-3, 1e-3]
    gate = dtype_gate(cost(1e-3, [1e-4, math.inf]), None)
    assert gate.tolerance == pytest.approx(2.1e-3)
    assert gate.layers == pytest.approx([3e-4, 2.1e-3])
    overflowed = dtype_gate(cost(math.inf, [math.inf]), None)
    assert overflowed.tolerance == OVERFLOW_TOLERANCE
    assert "overflows" in overflowed.origin
    assert dtype_gate(cost(1e-3, []), 0.5).tolerance == 0.5


def test_a_wide_bar_is_wide_in_every_respect() -> None:
    """bfloat16: twice the error leaves less of the cosine, and one flip passes that PyTorch did not make."""
    fine = dtype_gate(cost(1e-3, []), None)
    assert (fine.cosine, fine.flip_rate) == (0.999, 0.0)
    wide = dtype_gate(replace(cost(0.05, []), cosine=0.9988), None)
    assert wide.cosine == pytest.approx(0.9952) and wide.flip_rate == 0.01
    assert dtype_gate(cost(0.05, [], flips=3), None).flip_rate == 0.03


def test_a_gate_says_why() -> None:
    expected = np.tile(np.array([[5.0, 4.0, -3.0]]), (50, 1))
    gate = dtype_gate(cost(0.05, [], flips=2), None)

    def judged(change: object) -> str:
        actual = expected.copy()
        actual[0] = change
        comparison = LogitsComparison(gate.tolerance)
        comparison.add(actual, expected)
        return gate.judge(comparison)

    assert judged(expected[0]) == ""
    assert "NaN or Inf" in judged([math.nan, 0.0, 0.0])
    assert "exceeds the tolerance" in judged([9.0, -4.0, 3.0])
    flipping = expected.copy()
    flipping[:5] = [3.9, 5.0, -3.0]  # five turns of the top token; PyTorch's rate of 2 % allows one
    comparison = LogitsComparison(1e-3)
    comparison.add(flipping, expected)
    assert "5 of 50 positions beyond a tie" in dtype_gate(cost(0.3, [], flips=2), None).judge(comparison)


def test_layer_errors_average_over_tokens_of_all_sequences() -> None:
    errors = LayerErrors(2)
    assert errors.values() == []
    one, two = np.ones((3, 4)), np.ones((1, 4))
    errors.add([one, one * 1.2], [one, one])
    errors.add([two * 1.1, two], [two, two])
    assert errors.values() == pytest.approx([math.sqrt(0.01 / 4), math.sqrt(3 * 0.04 / 4)])
    assert errors.first_beyond([0.06, 0.06]) == 1
    assert errors.first_beyond([0.5, 0.5]) is None
    errors.add([np.full((1, 4), math.nan), two], [two, two])
    assert errors.first_beyond([0.5, 0.5]) == 0
