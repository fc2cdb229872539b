"""The README's commands and Python, run as written on a tiny model."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import write_tiny

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> str:
    found = re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)
    assert found, f"README.md has no {language} block"
    return "\n".join(found)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    # Stands for the sample, which `make demo` uses.
    write_tiny(folder / "smollm2", num_hidden_layers=4, max_position_embeddings=1024)
    return folder


@pytest.mark.timeout(900)
def test_commands(folder: Path) -> None:
    lines = [line for line in blocks("sh").splitlines() if line.strip()]
    assert len(lines) >= 9
    bin_folder = Path(sys.executable).parent
    for line in lines:
        words = shlex.split(line, comments=True)
        assert words[0] in ("mixt", "mixt-export")
        if words[1] == "sample":
            continue
        result = subprocess.run([bin_folder / words[0], *words[1:]], cwd=folder, capture_output=True, text=True)
        assert result.returncode == 0, f"{line}\n{result.stdout}\n{result.stderr}"
    assert (folder / "out" / "report.html").is_file()


def test_python(folder: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", blocks("python")], cwd=folder, capture_output=True, text=True, env=env
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("True ")


def test_local_links_exist() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
