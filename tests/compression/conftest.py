"""A tiny model and a text, for the tests that compress one by the other; files that need others have their own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.tiny import write_tiny


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    rng = np.random.default_rng(0)
    path.write_text("".join(rng.choice(list("abcdefgh \nßé"), 2000)), encoding="utf-8")
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "model", "qwen2")
