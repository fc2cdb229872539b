"""The command line as a user meets it: help, exit codes, one sentence per mistake."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mixt_export.cli.guard import guarded
from mixt_export.cli.main import VERBS
from mixt_export.errors import (
    CheckpointError,
    MissingDependencyError,
    MixtError,
    ParityError,
    ResourceError,
    UnsupportedError,
    UsageError,
)
from tests.tiny import write_tiny


def mixt(*arguments: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mixt_export.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env}, check=False)


def test_help_lists_every_verb_and_the_exit_codes() -> None:
    result = mixt("--help")
    assert result.returncode == 0
    assert all(verb in result.stdout for verb in VERBS)
    assert "parity failed" in result.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str) -> None:
    result = mixt(verb, "--help")
    assert result.returncode == 0 and "Usage" in result.stdout


def test_version() -> None:
    from mixt_export import __version__

    assert mixt("--version").stdout.strip() == f"mixt-export {__version__}"


@pytest.mark.parametrize("arguments", [("frobnicate",), ("export",), ("export", "x", "--bogus")])
def test_wrong_usage_is_2(arguments: tuple[str, ...]) -> None:
    result = mixt(*arguments)
    assert result.returncode == 2 and "Traceback" not in result.stderr and result.stderr


class Command:
    """A click command that raises."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def main(self, **_: object) -> None:
        raise self.error


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MixtError("a"), 1),
        (RuntimeError("a"), 1),
        (UsageError("a"), 2),
        (CheckpointError("a"), 2),
        (FileNotFoundError(2, "No such file", "a"), 2),
        (ParityError("a"), 3),
        (UnsupportedError("a"), 4),
        (ResourceError("a"), 5),
        (MemoryError(), 5),
        (OSError(28, "No space left on device", "a"), 5),
        (MissingDependencyError("a"), 6),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(error: BaseException, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded(Command(error), "mixt") == code
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1


def test_export_without_output(tmp_path: Path) -> None:
    result = mixt("export", write_tiny(tmp_path / "model"))
    assert result.returncode == 2 and result.stderr == "error: the output folder is missing; name it with -o.\n"


def test_options_from_a_file(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "model")
    good, bad, broken = (tmp_path / f"{name}.toml" for name in ("good", "bad", "broken"))
    good.write_text('target = "onnx"\nmax-seq-len = 100\nverify = false\n')
    bad.write_text("colour = 1\n")
    broken.write_text("target = \n")
    result = mixt("export", model, "-o", tmp_path / "out", "--config", good)
    assert result.returncode == 0, result.stderr
    assert "portable dialect" in result.stdout and "at 100 tokens" in result.stdout
    over = mixt("export", model, "--dry-run", "--config", good, "--target", "ort")
    assert "ort dialect" in over.stdout and "at 100 tokens" in over.stdout
    assert "'colour' is not an option" in mixt("export", model, "--config", bad).stderr
    assert "not valid TOML" in mixt("export", model, "--config", broken).stderr
    assert mixt("export", model, "--config", tmp_path / "absent.toml").returncode == 2


def test_a_missing_extra_is_6_and_names_it(tmp_path: Path) -> None:
    (tmp_path / "blocked" / "torch").mkdir(parents=True)
    (tmp_path / "blocked" / "torch" / "__init__.py").write_text("raise ModuleNotFoundError('no torch', name='torch')")
    model = write_tiny(tmp_path / "model")
    result = mixt("export", model, "-o", tmp_path / "out", PYTHONPATH=str(tmp_path / "blocked"))
    assert result.returncode == 6
    assert "pip install 'mixt-export[torch]'" in result.stderr and "--no-verify" in result.stderr
    assert not (tmp_path / "out").exists()
