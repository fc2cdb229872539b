"""Tiny exported folders, one per dialect, built once per test run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from mixt_export.runtime import load_runtime
from tests.runtimes.build_tiny import Shape, write_folder


@dataclass(frozen=True)
class Tiny:
    """A tiny folder, its weights, and the model loaded with one thread."""

    folder: Path
    shape: Shape
    weights: dict[str, np.ndarray]
    model: Any


@pytest.fixture(scope="session")
def rt() -> ModuleType:
    return load_runtime("ort")


def _tiny(dialect: str, root: Path, rt: ModuleType) -> Tiny:
    folder = root / dialect
    weights = write_folder(folder, dialect)
    return Tiny(folder, Shape(), weights, rt.Model(folder, threads=1))


@pytest.fixture(scope="session", params=["ort", "portable"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, rt: ModuleType) -> Tiny:
    return _tiny(request.param, tmp_path_factory.mktemp("tiny"), rt)


@pytest.fixture(scope="session")
def tiny_ort(tmp_path_factory: pytest.TempPathFactory, rt: ModuleType) -> Tiny:
    return _tiny("ort", tmp_path_factory.mktemp("tiny"), rt)
