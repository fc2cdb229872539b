"""Break an exported graph on purpose: verify must say so, and where."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixt_export.errors import UsageError
from mixt_export.verification import Report, VerifyOptions, verify
from tests.tiny import write_tiny
from tests.verification.handmade import write_handmade

#: fault -> (layer that has it, what the report must name, checks that must still pass)
AFTER = "final norm, last position or output projection"
FAULTS = {
    "swapped": (1, "model.layers.1", set()),
    "theta": (2, "model.layers.2", set()),
    "bias": (0, "model.layers.0", set()),
    "scale": (1, "model.layers.1", set()),
    "duplicated": (1, "model.layers.1", set()),
    "nan": (2, "model.layers.2", set()),
    "kv": (2, "model.layers.2", {"teacher_forced", "batch_prefill"}),
    "positions": (1, "model.layers.1", {"teacher_forced", "batch_prefill"}),
    "padding": (1, "model.layers.1", {"teacher_forced", "chunked_prefill", "decode", "greedy"}),
    "last": (0, AFTER, {"teacher_forced", "batch_prefill"}),
}


def failed(report: Report) -> set[str]:
    return {check.name for check in report.checks if not check.passed}


def test_a_correct_export_passes_every_check(model: Path, exported: Path, quick: VerifyOptions) -> None:
    report = verify(exported, model, options=quick)
    assert report.passed, [check for check in report.checks if not check.passed]
    assert report.verdict() == "PASSED"
    assert {check.name for check in report.checks} == {
        "declared", "teacher_forced", "batch_prefill", "batch_decode", "chunked_prefill", "decode", "far", "greedy",
        "redensified",
    }  # fmt: skip
    assert report.minimum_tolerance is not None
    assert 0.0 < report.minimum_tolerance < 1e-5
    assert len(report.layers) == 3


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught_and_named(fault: str, model: Path, tmp_path: Path, quick: VerifyOptions) -> None:
    layer, where, unharmed = FAULTS[fault]
    broken = write_handmade(tmp_path / "broken", model, faults={fault: layer})
    report = verify(broken, model, options=quick)
    assert not report.passed
    assert report.first_diverging_layer == where
    assert where in report.verdict()
    assert not failed(report) & unharmed
    assert all(check.reason for check in report.checks if not check.passed)
    if fault == "nan":
        assert report.minimum_tolerance is None
    else:
        assert report.minimum_tolerance is not None
        assert report.minimum_tolerance > 1e-3


def test_the_tolerance_that_would_have_passed_does_pass(model: Path, tmp_path: Path, quick: VerifyOptions) -> None:
    broken = write_handmade(tmp_path / "broken", model, faults={"theta": 2})
    needed = verify(broken, model, options=quick).minimum_tolerance
    assert needed is not None
    again = VerifyOptions(**{**vars(quick), "tolerance": 1.001 * needed})
    assert verify(broken, model, options=again).passed
    less = VerifyOptions(**{**vars(quick), "tolerance": 0.5 * needed})
    assert not verify(broken, model, options=less).passed


def test_float16_is_judged_by_what_the_dtype_costs(model: Path, tmp_path: Path, quick: VerifyOptions) -> None:
    good = write_handmade(tmp_path / "good", model, dtype="float16")
    report = verify(good, model, options=quick)
    assert report.passed, [check for check in report.checks if not check.passed]
    assert report.dtype_cost is not None
    assert 1e-5 < report.dtype_cost.rel_l2 < 2e-2
    assert report.tolerance == pytest.approx(2 * report.dtype_cost.rel_l2 + 1e-4)
    broken = write_handmade(tmp_path / "broken", model, dtype="float16", faults={"scale": 1})
    report = verify(broken, model, options=quick)
    assert not report.passed
    assert report.first_diverging_layer == "model.layers.1"


def test_an_export_of_the_first_layers_is_compared_with_those(tmp_path: Path, quick: VerifyOptions) -> None:
    long = write_tiny(tmp_path / "long", "llama", num_hidden_layers=4)
    short = write_tiny(tmp_path / "short", "llama", num_hidden_layers=2)
    cut = write_handmade(tmp_path / "cut", short)  # the same seed does not give the same weights: must fail
    assert not verify(cut, long, options=quick).passed
    with pytest.raises(UsageError, match="has 2 layers, the exported model 4"):
        verify(write_handmade(tmp_path / "whole", long), short, options=quick)


@pytest.mark.parametrize(("key", "value"), [("hidden_size", 32), ("vocab_size", 400)])
def test_another_model_as_reference_is_a_usage_error(
    key: str, value: int, exported: Path, tmp_path: Path, quick: VerifyOptions
) -> None:
    other = write_tiny(tmp_path / "other", "qwen2", tied=False, **{key: value})
    with pytest.raises(UsageError, match="--reference"):
        verify(exported, other, options=quick)


def test_results_do_not_depend_on_a_second_run(model: Path, exported: Path, quick: VerifyOptions) -> None:
    first, second = (verify(exported, model, options=quick) for _ in range(2))
    assert [check.metrics for check in first.checks] == [check.metrics for check in second.checks]
