from __future__ import annotations

import os

import pytest

from mixt_export.verification.session import available_threads


@pytest.mark.parametrize(("cores", "wanted"), [(1, 1), (2, 1), (8, 4)])
def test_half_the_cores_by_default(cores: int, wanted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(cores)))
    assert available_threads(0) == wanted
    assert available_threads(3) == 3
