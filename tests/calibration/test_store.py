"""Stored constants: what was written is read, nothing half-written stays, every kind of damage is one sentence."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mixt_export.calibration import load_device, save, stored_path
from mixt_export.calibration.fit import Measurement
from mixt_export.calibration.grid import grid
from mixt_export.calibration.machine import cpu_name, second_level_cache
from mixt_export.calibration.measure import Calibration
from mixt_export.errors import UsageError
from mixt_export.plan import CPU
from mixt_export.plan.cost import operation_seconds
from mixt_export.targets.constants import constants_named

DEVICE = replace(CPU, name="a CPU, onnxruntime 1.2, 1 thread", mac=1.23456789e-11, cache=123457)


def calibration() -> Calibration:
    times = tuple(
        Measurement(p.operation, p.tokens, operation_seconds(p.operation, p.tokens, DEVICE)) for p in grid(0.1)
    )
    return Calibration(DEVICE, times, "a CPU", "1.2", 1)


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    path = tmp_path / "devices" / "here.json"
    save(calibration(), path)
    return path


def test_round_trip(stored: Path) -> None:
    assert load_device(stored) == DEVICE
    assert [path.name for path in stored.parent.iterdir()] == ["here.json"]
    values = json.loads(stored.read_text())
    assert (values["cpu"], values["onnxruntime"], values["threads"], values["median_error"]) == ("a CPU", "1.2", 1, 0.0)


def test_an_interrupted_write_leaves_what_was_there(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = stored.read_bytes()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(replace(calibration(), device=CPU), stored)
    assert stored.read_bytes() == before and len(list(stored.parent.iterdir())) == 1


def change(path: Path, key: str, value: object) -> None:
    values = json.loads(path.read_text())
    values["device"][key] = value
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("mac", -1e-9, "mac must be seconds from 0 to 1"),
        ("mac", "fast", "mac must be seconds"),
        ("mac", True, "mac must be seconds"),
        ("node", 5, "node must be seconds"),
        ("tile", 0, "tile must be a whole number from 1"),
        ("cache", 1.5, "cache must be a whole number"),
        ("name", "", "name must be a text"),
        ("speed", 1, "'speed' is unknown"),
    ],
)
def test_a_wrong_constant_is_one_sentence(stored: Path, key: str, value: object, said: str) -> None:
    change(stored, key, value)
    with pytest.raises(UsageError) as caught:
        load_device(stored)
    assert said in str(caught.value) and str(stored) in str(caught.value) and "calibrate-device" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not valid JSON"),
        ("[]", "must be a JSON object"),
        ('{"schema": 1, "schema": 1}', "occurs twice"),
        ('{"schema": 2}', "schema 2"),
        ('{"schema": 1}', "expected the keys"),
        ('{"schema": NaN}', "not valid JSON"),
    ],
)
def test_a_damaged_file_is_one_sentence(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "constants.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=said) as caught:
        load_device(path)
    assert str(path) in str(caught.value) and str(caught.value).count(str(path)) == 1


def test_missing_constants(stored: Path, tmp_path: Path) -> None:
    values = json.loads(stored.read_text())
    del values["device"]["stream"]
    stored.write_text(json.dumps(values))
    with pytest.raises(UsageError, match="'stream' is missing"):
        load_device(stored)
    with pytest.raises(UsageError, match="no such file of device constants"):
        load_device(tmp_path / "nowhere.json")


def test_all_constants_zero(stored: Path) -> None:
    values = json.loads(stored.read_text())
    values["device"] = {
        key: value if key in ("name", "tile", "cache") else 0 for key, value in values["device"].items()
    }
    stored.write_text(json.dumps(values))
    with pytest.raises(UsageError, match="every constant is zero"):
        load_device(stored)


def test_names_that_an_export_takes(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXT_CACHE", str(stored.parent.parent))
    assert constants_named("default", "ort") == CPU and constants_named("default", "trt") == CPU
    assert constants_named(str(stored), "onnx") == DEVICE
    with pytest.raises(UsageError, match="calibrate-device"):
        constants_named("local", "ort")
    monkeypatch.setattr("mixt_export.targets.constants.local_path", lambda: stored)
    assert constants_named("local", "ort") == DEVICE
    with pytest.raises(UsageError, match="--device"):
        constants_named("local", "trt")


def test_one_file_for_each_cpu_version_and_thread_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXT_CACHE", str(tmp_path))
    path = stored_path("Intel(R) Xeon(R) Gold ../etc", "1.31.1", 2)
    assert path == tmp_path / "devices" / "intel-r-xeon-r-gold-etc-ort-1-31-1-threads-2.json"
    assert (
        len({stored_path("a", "1", 1), stored_path("a", "1", 2), stored_path("a", "2", 1), stored_path("b", "1", 1)})
        == 4
    )


def test_what_the_operating_system_says(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor : 0\nmodel name\t: Some CPU @ 2 GHz\n")
    assert cpu_name(tmp_path / "cpuinfo") == "Some CPU @ 2 GHz" and cpu_name(tmp_path / "none")
    for index, (level, size) in enumerate((("1", "48K"), ("2", "2048K"), ("3", "105M"))):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "level").write_text(level + "\n")
        (tmp_path / f"index{index}" / "size").write_text(size + "\n")
    assert second_level_cache(tmp_path) == 2 << 20 and second_level_cache(tmp_path / "none") is None
