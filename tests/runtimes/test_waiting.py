"""Threads without work wait busily for microseconds, then sleep."""

from __future__ import annotations

from types import ModuleType

import onnxruntime
import pytest

from tests.runtimes.conftest import Tiny
from tests.runtimes.test_integer_sums import entry

SPIN, LIMIT = "session.intra_op.allow_spinning", "session.intra_op.spin_duration_us"


@pytest.mark.parametrize(
    ("version", "long", "expected"),
    [
        ("1.31.1", False, ("1", "20")),
        ("1.31.0.dev20260901", False, ("1", "20")),
        ("2.0.0", False, ("1", "20")),
        ("1.31.1", True, ("1", None)),
        ("1.30.9", False, ("0", None)),
        ("1.22", True, ("1", None)),
    ],
)
def test_how_threads_wait(rt: ModuleType, version: str, long: bool, expected: tuple[str, str | None]) -> None:
    options = onnxruntime.SessionOptions()
    rt._wait(options, version, long=long)
    assert (entry(options, SPIN), entry(options, LIMIT)) == expected


@pytest.mark.parametrize("spinning", [True, False])
def test_both_ways_give_the_same_tokens(rt: ModuleType, tiny_ort: Tiny, spinning: bool) -> None:
    expected = list(tiny_ort.model.generate([1, 2, 3], 8, stop=()))
    model = rt.Model(tiny_ort.folder, threads=2, spinning=spinning)
    assert list(model.generate([1, 2, 3], 8, stop=())) == expected
