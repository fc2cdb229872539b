from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mixt_export.verification import VerifyOptions
from tests.tiny import write_tiny
from tests.verification.handmade import write_handmade

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2 folder: attention biases, an untied head."""
    return write_tiny(tmp_path_factory.mktemp("verification") / "model", "qwen2", tied=False)


@pytest.fixture(scope="session")
def exported(model: Path) -> Path:
    return write_handmade(model.parent / "exported", model)


@pytest.fixture
def quick() -> VerifyOptions:
    return VerifyOptions(positions=40, greedy_tokens=5, memory=False, threads=1, write=False)
