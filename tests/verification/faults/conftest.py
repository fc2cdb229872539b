from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mixt_export.verification import VerifyOptions
from tests.verification.faults.attempt import Outcome, attempt, expected
from tests.verification.faults.cases import LAYER, small_case
from tests.verification.faults.registry import ANY, Kind

torch.set_num_threads(1)

#: Few positions and tokens, default thresholds.
QUICK = VerifyOptions(positions=40, greedy_tokens=4, memory=False, threads=1, write=False)


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small models and their clean exports, each made once."""
    return tmp_path_factory.mktemp("faults")


@pytest.fixture
def caught(root: Path, tmp_path: Path) -> Callable[[Kind], Outcome]:
    """Put a kind of fault into its small model; verify must catch it and name the place."""

    def run(kind: Kind) -> Outcome:
        model, clean = small_case(kind.case, root)
        found = attempt(kind, clean, model, tmp_path / "broken", LAYER, QUICK)
        assert found.caught, "verify passed a broken export"
        assert kind.where == ANY or found.where == expected(kind, LAYER), found
        assert found.part.startswith(kind.part), found
        return found

    return run
