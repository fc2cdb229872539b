"""What tests of calibration share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text long enough for windows of tiny models."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("a few words of a text that nobody reads, again and again. " * 400, encoding="utf-8")
    return path
