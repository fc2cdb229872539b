"""The arrows of docs/architecture.md: a room imports only rooms below it, and export needs no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "mixt_export"

#: From the top down; modules of one row may not import each other's rooms either.
ORDER = [
    ["cli"],
    ["accounting", "doctor", "inspection"],
    ["sweep"],
    ["evaluation"],
    ["targets"],
    ["building"],
    ["verification"],
    ["passes"],
    ["compression"],
    ["reference"],
    ["lower"],
    ["calibration"],
    ["plan"],
    ["families"],
    ["quantisation"],
    ["sample", "runtime"],
    ["checkpoints"],
    ["network"],
    ["optional", "progress", "resources", "selection", "staging", "tokenizer"],
    ["errors"],
]
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}


def imports_of(path: Path) -> set[str]:
    """Rooms that ``path`` imports, type-checking blocks included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("mixt_export.")}
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room == "__init__":
        return
    assert room in RANK, f"{room} has no place in the order; add it to docs/architecture.md and here"
    for other in imports_of(path) - {room}:
        assert RANK[other] > RANK[room], f"{room} imports {other}"


def modules_after(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(' '.join(sys.modules))"
    return set(
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    )


def test_export_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    from tests.tiny import write_tiny

    write_tiny(tmp_path / "model")
    loaded = modules_after(
        f"from mixt_export import export\nexport({str(tmp_path / 'model')!r}, {str(tmp_path / 'out')!r}, verify=False)"
    )
    assert not {"torch", "transformers", "onnxruntime"} & loaded
    assert (tmp_path / "out" / "model.onnx").is_file()


def test_help_imports_nothing_heavy() -> None:
    loaded = modules_after(
        "from mixt_export.cli.main import mixt\nsys.argv = ['mixt', '--help']\n"
        "import io, contextlib\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit): mixt()"
    )
    assert not {"torch", "transformers", "onnxruntime", "numpy", "onnx", "onnx_ir"} & loaded
