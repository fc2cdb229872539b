"""Exported folders with golden tensors, and the device scripts as modules."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mixt_export.building import record_golden
from mixt_export.building.toolkit import bundle_folder, toolkit
from mixt_export.resources import resource
from mixt_export.targets import export
from mixt_export.targets.trt import TrtOptions
from tests.runtimes_trt.fake_cuda import FakeCudart
from tests.runtimes_trt.fake_tensorrt import fake_tensorrt
from tests.tiny import write_tiny

MAX_SEQ_LEN, MAX_INPUT_LEN = 150, 24


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model"), num_hidden_layers=3, eos_token_id=299)


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Callable[[int, str], Path]:
    """The tiny model exported for a JetPack at a dtype, with golden tensors; made once, to be copied."""
    made: dict[tuple[int, str], Path] = {}

    def make(jetpack: int, dtype: str) -> Path:
        key = jetpack, dtype
        if key not in made:
            made[key] = tmp_path_factory.mktemp(f"trt{jetpack}{dtype}") / "out"
            options = TrtOptions(jetpack=jetpack, max_input_len=MAX_INPUT_LEN)
            export(tiny_model, made[key], target="trt", dtype=dtype, max_seq_len=MAX_SEQ_LEN, trt=options, verify=False)
            record_golden(tiny_model, made[key], made[key] / "device" / "golden")
        return made[key]

    return make


@pytest.fixture
def folder(tmp_path: Path, exports: Callable[[int, str], Path]) -> Path:
    """A fresh copy of the float32 export for JetPack 6."""
    return Path(shutil.copytree(exports(6, "fp32"), tmp_path / "out"))


@dataclass
class Board:
    """A pretended board: ``version`` of TensorRT, and the scripts with its libraries put in."""

    version: str
    scripts: dict[str, ModuleType]
    cudart: FakeCudart
    faults: dict[str, Any]

    def __call__(self, script: str, *arguments: object) -> int:
        """Run a device script; its exit code."""
        module = fake_tensorrt(self.version, self.cudart, **self.faults)
        cuda = toolkit("cuda").Cuda(self.cudart)
        return int(self.scripts[script].main([str(word) for word in arguments], module=module, cuda=cuda))


@pytest.fixture(scope="session")
def scripts() -> Iterator[dict[str, ModuleType]]:
    """The device scripts; their folder's modules are those that mixt_export uses too."""
    toolkit("errors")
    spec = importlib.util.spec_from_file_location("mixt_ort", resource("runtimes") / "ort" / "mixt_ort.py")
    assert spec is not None and spec.loader is not None
    shared = importlib.util.module_from_spec(spec)
    sys.modules["mixt_ort"] = shared
    spec.loader.exec_module(shared)
    found = {}
    for name in ("build_engine", "check_parity", "run"):
        spec = importlib.util.spec_from_file_location(f"device_{name}", bundle_folder() / f"{name}.py")
        assert spec is not None and spec.loader is not None
        found[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found[name])
    yield found
    del sys.modules["mixt_ort"]


@pytest.fixture
def board(scripts: dict[str, ModuleType]) -> Callable[..., Board]:
    """``board("10.3", capability=87, total=2**30, build_error="…")``: a board, its GPU and what goes wrong on it."""

    def make(
        version: str = "10.3", *, capability: int = 87, total: int = 1 << 30, capturable: bool = True, **faults: Any
    ) -> Board:
        cudart = FakeCudart(capability=capability, total=total, capturable=capturable)
        return Board(version, scripts, cudart, faults)

    return make
