from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.verification.faults import of_graph
from tests.verification.faults.attempt import Outcome
from tests.verification.faults.registry import KINDS, Kind

OWN = [kind for kind in KINDS if kind.inject.__module__ == of_graph.__name__]


@pytest.mark.parametrize("kind", OWN, ids=lambda kind: kind.name)
def test_a_fault_is_caught_and_named(kind: Kind, caught: Callable[[Kind], Outcome]) -> None:
    found = caught(kind)
    assert "files" not in found.caught_by, "the numbers must catch it, not a digest"
    assert found.exit_code == 3
