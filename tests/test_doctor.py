"""`mixt doctor` on this machine, and on one where packages are missing."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from typer.testing import CliRunner

from mixt_export import doctor
from mixt_export.cli.doctor import app
from mixt_export.errors import MissingDependencyError

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def hide(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    """Make ``modules`` look not installed to the doctor."""
    real = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> Any:
        return None if name in modules else real(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)


def test_table_is_what_pyproject_declares() -> None:
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]

    def names(lines: list[str]) -> set[str]:
        return {re.split(r"[<>=!~\[ ;]", line)[0] for line in lines}

    declared = {(name, "") for name in names(project["dependencies"])}
    for extra, lines in project["optional-dependencies"].items():
        if extra != "dev":
            declared |= {(name, extra) for name in names(lines)}
    assert declared == {(r.distribution, r.extra) for r in doctor.REQUIREMENTS}


def test_json_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["--json"])
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    versions = {package["name"]: package["version"] for package in data["packages"]}
    assert versions["numpy"] == np.__version__
    assert versions["onnxruntime"] == onnxruntime.__version__
    assert data["onnxruntime_providers"] == onnxruntime.get_available_providers()
    assert data["python"].endswith(".".join(map(str, sys.version_info[:3])))
    assert data["missing_core"] == []
    assert data["logical_cores"] == os.cpu_count()
    assert data["disks"][str(tmp_path)] > 0
    assert data["resources"] == {"graphs": True, "runtimes": True}
    assert list(tmp_path.iterdir()) == []


def test_sample_is_looked_for_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXT_CACHE", str(tmp_path / "not" / "there"))
    findings = doctor.examine(tmp_path)
    assert findings.sample_complete is False
    assert findings.sample_folder is not None
    assert findings.sample_folder.startswith(str(tmp_path / "not" / "there"))
    assert not (tmp_path / "not").exists()
    assert "not fetched yet: mixt sample" in CliRunner().invoke(app, []).stdout


def test_missing_extra_is_named_and_harmless(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "gguf")
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 0
    assert re.search(r"gguf \[sample\]\s+missing: pip install 'mixt-export\[sample\]'", result.stdout)


@pytest.mark.parametrize("module", ["opt_einsum", "onnxruntime"])
def test_missing_core_package(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    hide(monkeypatch, module)
    name = module.replace("_", "-")
    result = CliRunner().invoke(app, [])
    assert isinstance(result.exception, MissingDependencyError)
    assert result.exception.exit_code == 6
    assert str(result.exception) == f"core packages are missing: pip install {name}."
    assert re.search(rf"{name}\s+missing \(needed\): pip install '{name}'", result.stdout)


def test_exit_code_of_the_program() -> None:
    code = "from mixt_export.cli.main import mixt; import sys; sys.argv = ['mixt', 'doctor', '--json']; mixt()"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(run.stdout)["mixt_export"]


def test_other_distribution_of_the_same_module(monkeypatch: pytest.MonkeyPatch) -> None:
    found = doctor._version(doctor.Requirement("numpy-gpu", "numpy"))
    assert found == f"{np.__version__} (numpy)"


def test_hardlinks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.hardlinks_work(tmp_path) is True
    assert doctor.hardlinks_work(tmp_path / "absent") is False

    def refuse(_source: object, _target: object) -> None:
        raise OSError("not supported")

    monkeypatch.setattr(os, "link", refuse)
    assert doctor.hardlinks_work(tmp_path) is False
    assert list(tmp_path.iterdir()) == []


def test_memory_and_processor_from_system_files(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "/proc/meminfo": "MemTotal:  8000 kB\nMemFree: 1 kB\nMemAvailable:  6000 kB\n",
        "/proc/cpuinfo": "processor : 0\nmodel name\t: Cortex-A78AE\nFeatures\t: fp asimd asimddp fphp aes\n",
        "/sys/fs/cgroup/memory.max": "4096000\n",
        "/sys/fs/cgroup/memory.current": "1000000\n",
    }
    monkeypatch.setattr(doctor, "_read", lambda path: files.get(str(path), ""))
    assert doctor._memory() == (4096000, 3096000)
    assert doctor._cpu_name() == "Cortex-A78AE"
    assert doctor.cpu_features() == ("asimd", "fphp", "asimddp")
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert doctor._memory() == (8000 * 1024, 6000 * 1024)
