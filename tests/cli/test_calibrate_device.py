"""`mixt calibrate-device`: what it measures is stored, shown and used; bad input is one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixt_export.calibration import load_device, measure
from mixt_export.calibration.probe import Probe
from mixt_export.cli.guard import guarded
from mixt_export.cli.main import load_verb
from mixt_export.plan import CPU


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["mixt calibrate-device", *arguments])
    return guarded(load_verb("calibrate-device"), "mixt calibrate-device")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every operator takes a nanosecond per multiply-add, and a cache folder of its own."""
    monkeypatch.setenv("MIXT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(measure, "_timing", slow)
    monkeypatch.setattr(measure, "empty", lambda threads: (0.0, 0.0))
    monkeypatch.setattr(measure, "node", lambda threads: 3e-6)


def slow(probe: Probe, threads: int) -> float:
    return probe.copies * (1e-6 + 1e-9 * probe.tokens * probe.operation.macs)


@pytest.mark.usefixtures("quick")
def test_measured_stored_and_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch) == 0
    said = capsys.readouterr().out
    (path,) = (tmp_path / "cache" / "devices").iterdir()
    device = load_device(path)
    assert str(path) in said and "--device-constants local" in said and device.name in said
    assert device.node == 3e-6
    assert device.mac == pytest.approx(1e-9, rel=0.2) and device.mac > 20 * CPU.mac
    assert run(monkeypatch, "--show") == 0
    assert f"{1e9 * device.mac:.4g} ns" in capsys.readouterr().out


@pytest.mark.usefixtures("quick")
def test_more_threads_have_a_file_of_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "two.json"
    assert run(monkeypatch, "--threads", "2", "-o", str(path)) == 0
    assert load_device(path).name.endswith("2 threads")


@pytest.mark.usefixtures("quick")
def test_an_interruption_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    times = iter(range(40))

    def interrupted(probe: Probe, threads: int) -> float:
        if next(times) == 39:
            raise KeyboardInterrupt
        return slow(probe, threads)

    monkeypatch.setattr(measure, "_timing", interrupted)
    assert run(monkeypatch) == 130
    assert not (tmp_path / "cache").exists()


@pytest.mark.usefixtures("quick")
def test_a_machine_too_busy_to_be_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure, "_timing", lambda probe, threads: 0.0)
    assert run(monkeypatch) == 5
    assert "too busy" in capsys.readouterr().err and not (tmp_path / "cache").exists()


@pytest.mark.usefixtures("quick")
def test_bad_input_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setattr(measure, "_timing", lambda probe, threads: pytest.fail("measured before looking at -o"))
    for arguments, said in (
        (("--show",), "no such file of device constants"),
        (("-o", str(tmp_path)), "is a folder"),
        (("--threads", "0"), "greater than"),
        (("-o", str(file / "below")), "Not a directory"),
    ):
        assert run(monkeypatch, *arguments) == 2
        text = capsys.readouterr().err
        assert said in text and "Traceback" not in text
