from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.verification.faults import of_files
from tests.verification.faults.attempt import Outcome
from tests.verification.faults.registry import KINDS, Kind

OWN = [kind for kind in KINDS if kind.inject.__module__ == of_files.__name__]


@pytest.mark.parametrize("kind", OWN, ids=lambda kind: kind.name)
def test_a_fault_is_caught_and_named(kind: Kind, caught: Callable[[Kind], Outcome]) -> None:
    found = caught(kind)
    assert found.caught_by[0] in ("files", "refused")
    assert found.exit_code == (2 if found.caught_by == ["refused"] else 3)
    assert found.reason


def test_there_are_many_kinds_and_each_has_a_name_of_its_own() -> None:
    assert len(KINDS) >= 50
    assert len({kind.name for kind in KINDS}) == len(KINDS)
