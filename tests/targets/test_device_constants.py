"""Whose constants an export plans with: the default ones unless asked, others by file; the manifest names them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mixt_export.calibration import save
from mixt_export.calibration.fit import Measurement
from mixt_export.calibration.measure import Calibration
from mixt_export.cli.export import app
from mixt_export.errors import UsageError
from mixt_export.plan import CPU
from mixt_export.plan.operations import Operation
from mixt_export.targets import export, plan_export
from tests.tiny import write_tiny, write_tiny_mixt


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("constants")
    return write_tiny_mixt(folder / "model", write_tiny(folder / "base", num_hidden_layers=1), 4)


@pytest.fixture
def slow_to_start(tmp_path: Path) -> Path:
    """A CPU that starts operators so slowly that only their number counts."""
    path = tmp_path / "slow.json"
    device = replace(CPU, name="slow to start", node=1e-2)
    save(Calibration(device, (Measurement(Operation("reshape"), 1, 1e-2),), "a CPU", "1", 1), path)
    return path


def test_an_export_depends_on_no_stored_calibration(
    model: Path, slow_to_start: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mixt_export.targets.constants.local_path", lambda: slow_to_start)
    assert plan_export(model).forms.device == CPU


def test_the_manifest_names_the_constants_and_they_decide(model: Path, slow_to_start: Path, tmp_path: Path) -> None:
    for name, arguments in {"default": [], "slow": ["--device-constants", str(slow_to_start)]}.items():
        result = CliRunner().invoke(app, [str(model), "-o", str(tmp_path / name), "--no-verify", *arguments])
        assert result.exit_code == 0, result.output
    plans = {
        name: json.loads((tmp_path / name / "mixt_manifest.json").read_text())["plan"] for name in ("default", "slow")
    }
    assert (plans["default"]["device"], plans["slow"]["device"]) == ("cpu", "slow to start")
    nodes = {
        name: sum(
            len(choice.form.operations) for choice in plan_export(model, constants=constants).forms.choices.values()
        )
        for name, constants in {"default": CPU, "slow": replace(CPU, node=1e-2)}.items()
    }
    assert nodes["slow"] <= nodes["default"]


def test_a_damaged_file_is_said_before_anything_is_written(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_text("{")
    result = CliRunner().invoke(app, [str(model), "-o", str(tmp_path / "out"), "--device-constants", str(path)])
    assert isinstance(result.exception, UsageError) and "broken.json" in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_python_takes_a_device(model: Path, tmp_path: Path) -> None:
    device = replace(CPU, name="mine")
    result = export(model, tmp_path / "out", constants=device, verify=False)
    assert result.manifest["plan"]["device"] == "mine"
