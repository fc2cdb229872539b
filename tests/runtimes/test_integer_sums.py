"""Products of int8 by int8 are added without saturation on every processor."""

from __future__ import annotations

import ctypes
import json
import platform
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from tests.quantisation import oracle
from tests.runtimes.build_tiny import Shape, write_folder

SWITCH = "session.x64quantprecision"
INTEGER = {"quantisation": {"matrices": {"a": {"bits": 4}, "b": {"bits": 8, "activations": "call"}}}}


@pytest.fixture
def old(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rt: ModuleType) -> None:
    """As if on x86 without VNNI."""
    processor(monkeypatch, tmp_path, rt, "x86_64", "flags : fpu avx2 fma\n")


def processor(monkeypatch: pytest.MonkeyPatch, folder: Path, rt: ModuleType, machine: str, listed: str | None) -> None:
    """Let the runner believe to be on ``machine`` whose /proc/cpuinfo is ``listed`` (None: there is none)."""
    path = folder / "cpuinfo"
    if listed is not None:
        path.write_text(listed)
    monkeypatch.setattr(rt, "_CPUINFO", path)
    monkeypatch.setattr(platform, "machine", lambda: machine)


@pytest.mark.parametrize(
    ("machine", "listed", "expected"),
    [
        ("x86_64", "processor : 0\nflags\t\t: fpu sse avx2 fma\nflags : avx_vnni\n", True),
        ("x86_64", "flags\t\t: fpu avx2 avx512_vnni\n", False),
        ("x86_64", "flags : avx2 avx_vnni\n", False),
        ("x86_64", "flags : amx_int8\n", False),
        ("x86_64", "nothing of the kind\n", True),
        ("AMD64", None, True),
        ("aarch64", "Features : asimd\n", False),
        ("arm64", None, False),
    ],
)
def test_where_onnxruntime_is_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rt: ModuleType, machine: str, listed: str | None, expected: bool
) -> None:
    processor(monkeypatch, tmp_path, rt, machine, listed)
    options = onnxruntime.SessionOptions()
    assert rt.sum_exactly(options) is expected
    assert entry(options) == ("1" if expected else None)


def entry(options: Any, name: str = SWITCH) -> str | None:
    """What ``options`` say about ``name``."""
    try:
        return str(options.get_session_config_entry(name))
    except RuntimeError:
        return None


@pytest.mark.parametrize("sign", [-1, 1])
def test_sums_of_the_largest_products(sign: int) -> None:
    """Two products of 255 by 127 are 64,770, more than 16 bits hold."""
    x = np.full((1, 5, 64), 2.0, np.float32)
    codes, scales = np.full((64, 16), sign * 127, np.int8), np.linspace(0.01, 0.02, 16).astype(np.float32)
    expected = oracle.rounded_call(x) @ (codes.astype(np.float64) * scales)
    found = oracle.dynamic_product(x, codes, scales)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.usefixtures("old")
@pytest.mark.parametrize(("extra", "expected"), [(INTEGER, "1"), ({}, None), ({"quantisation": {"bits": 8}}, None)])
def test_only_for_folders_with_such_products(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rt: ModuleType, extra: dict[str, Any], expected: str | None
) -> None:
    write_folder(tmp_path, "ort", Shape())
    path = tmp_path / "mixt_manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | extra))
    seen = []
    make = onnxruntime.InferenceSession

    def session(model: str, options: Any, **named: Any) -> Any:
        seen.append(entry(options))
        return make(model, options, **named)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    rt.Model(tmp_path, threads=1)
    assert seen == [expected]


@pytest.mark.parametrize("said", [{}, {"quantisation": 3}, {"quantisation": {"matrices": [{"activations": "call"}]}}])
def test_manifests_without_such_products(rt: ModuleType, tmp_path: Path, said: dict[str, Any]) -> None:
    write_folder(tmp_path, "ort", Shape())
    path = tmp_path / "mixt_manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | said))
    assert rt.read_manifest(tmp_path).integer_products is False
    path.write_text(json.dumps(json.loads(path.read_text()) | INTEGER))
    assert rt.read_manifest(tmp_path).integer_products is True


def test_what_is_freed_goes_back_while_weights_are_rewritten(monkeypatch: pytest.MonkeyPatch, rt: ModuleType) -> None:
    calls: list[tuple[int, int]] = []
    library = SimpleNamespace(mallopt=lambda *given: calls.append(given))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    with rt._freed_at_once(False):
        pass
    assert calls == []
    with pytest.raises(ValueError, match="no session"), rt._freed_at_once(True):
        assert calls == [(-3, 1 << 16)]
        raise ValueError("no session")
    assert calls[1:] == [(-3, 1 << 25), (-1, 1 << 26)]


def test_other_c_libraries(monkeypatch: pytest.MonkeyPatch, rt: ModuleType) -> None:
    def refused(name: str | None) -> None:
        raise TypeError("no name, no library")

    for failing in (lambda name: SimpleNamespace(), refused):
        monkeypatch.setattr(ctypes, "CDLL", failing)
        with rt._freed_at_once(True):
            reached = True
    assert reached
