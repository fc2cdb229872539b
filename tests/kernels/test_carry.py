"""What an export carries for the plugins: nodes that ask for them, PTX, an index; and what happens without Triton."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import pytest

from mixt_export.building.kernels import Compiled, Failed, Fault, Inspection, cache, carry, gates
from mixt_export.runtime import toolkit
from tests.kernels.models import exported

kernel_files, plugins, errors = (toolkit(name) for name in ("kernel_files", "plugins", "errors"))


class Notes:
    """A Progress that keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    @contextmanager
    def task(self, label: str, total: int | None = None) -> Iterator[Any]:
        yield lambda _units: None

    def note(self, message: str) -> None:
        self.said.append(message)


def nodes(out: Path) -> list[onnx.NodeProto]:
    model = onnx.load(out / "model.onnx", load_external_data=False)
    return [node for node in model.graph.node if any(attribute.name == "aot" for attribute in node.attribute)]


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXT_CACHE", str(tmp_path / "cache"))


def test_an_export_carries_its_kernels_and_the_next_one_takes_them_from_the_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    notes = Notes()
    out = exported(monkeypatch, tmp_path / "first", "train2", progress=notes)
    found = nodes(out)
    assert len(found) == 7 and {node.op_type for node in found} == {"TTLinear2"}
    for node in found:
        given = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        assert given["plugin_namespace"] == b"mixt" and given["plugin_version"] == b"1" and given["aot"] == 1
    folder = out / "device" / "kernels"
    index = kernel_files.read_index(folder)
    assert index.operators == ("TTLinear2",)
    assert sorted(index.kernels) == ["tt2-r16-k32-j32-a8-odd"]
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [*(f"{k}.ptx" for k in index.kernels), "index.json"]
    )
    for kernel in index.kernels.values():
        assert f".visible .entry {kernel.entry}(" in kernel.ptx()
    assert notes.said == [
        "1 kernel compiled for 7 of 7 linears that can use one; TensorRT 10.9 and later launches them. They were "
        "checked by an assembler; no engine with them was run on a device."
    ]

    def no_compiler(kernels: list[Any], _progress: Any) -> Iterator[Any]:
        assert not kernels
        return iter(())

    monkeypatch.setattr(cache, "compile_kernels", no_compiler)
    again = exported(monkeypatch, tmp_path / "second", "train2")
    for path in folder.iterdir():
        assert path.read_bytes() == (again / "device" / "kernels" / path.name).read_bytes()


def test_without_triton_the_export_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(carry, "triton_version", lambda: None)
    notes = Notes()
    out = exported(monkeypatch, tmp_path, "train2", progress=notes)
    assert len(nodes(out)) == 7 and not (out / "device" / "kernels").exists()
    assert notes.said == [
        "kernels were not compiled, because the Python package 'triton' is not installed (pip install "
        "'mixt-export[kernels]'); TensorRT uses the bodies of the functions instead."
    ]
    assert kernel_files.read_index(out / "device" / "kernels") is None


def test_a_kernel_that_a_gate_stops_leaves_its_operator_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(carry, "obtain", lambda kernels, _: [Failed(kernel, "spills: 8 bytes") for kernel in kernels])
    notes = Notes()
    out = exported(monkeypatch, tmp_path, "train2", progress=notes)
    index = kernel_files.read_index(out / "device" / "kernels")
    assert index.operators == () and not index.kernels
    assert notes.said[0].startswith("0 kernels compiled for 0 of 7 linears")
    assert notes.said[0].endswith("Not usable: tt2-r16-k32-j32-a8-odd (spills: 8 bytes).")


@pytest.mark.parametrize(
    ("structure", "jetpack", "dtype"), [("train2", 6, "fp16"), ("train2", 7, "bf16"), ("dense", 7, "fp16")]
)
def test_nothing_is_asked_for_where_nothing_is_to_be_had(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, structure: str, jetpack: int, dtype: str
) -> None:
    """TensorRT 10.3 has no such plugins, bfloat16 no kernels, a plain matrix needs none."""
    notes = Notes()
    out = exported(monkeypatch, tmp_path, structure, jetpack=jetpack, dtype=dtype, progress=notes)
    assert not nodes(out) and not notes.said and not (out / "device" / "kernels").exists()


def test_the_cache_takes_what_passed_and_nothing_that_was_changed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiled: list[Any] = []

    def compile_kernels(kernels: list[Any], _progress: Any) -> Iterator[Compiled]:
        compiled.extend(kernels)
        return (Compiled(kernel, f"{kernel.name}\n", "k", 0, 128) for kernel in kernels)

    faults = {"tt2-r16-k32-j64-a8": (Fault("mma", "none"),)}
    monkeypatch.setattr(cache, "compile_kernels", compile_kernels)
    monkeypatch.setattr(gates, "inspect", lambda found: Inspection(0, 0, 0, 0, {}, faults.get(found.kernel.name, ())))
    make = toolkit("tactics").train_kernel
    kernels = [make(16, 32, wide, bias=False, align=8, odd=False) for wide in (False, True)]
    for _ in range(2):
        stopped, good = cache.obtain(kernels)
        assert stopped == Failed(kernels[1], "mma: none") and good.ptx == "tt2-r16-k32-j32-a8\n"
    assert compiled == [kernels[0], kernels[1], kernels[1]]
    (path,) = (tmp_path / "cache" / "kernels").glob("*.json")
    path.write_text(path.read_text().replace("j32-a8", "j32-a9"))
    assert next(iter(cache.obtain(kernels[:1]))).ptx == "tt2-r16-k32-j32-a8\n" and compiled[-1] == kernels[0]


KERNEL = {"file": "k.ptx", "sha256": "0", "entry": "k", "threads": 32, "shared": 0}
SPOILED = {
    "schema": ({"schema": 2}, r"schema 2 is not 1"),
    "no kernels": ({"kernels": None}, r"is no index of kernels"),
    "a path": ({"kernels": {"k": KERNEL | {"file": "../k.ptx"}}}, "no plain file"),
    "too many threads": (
        {"kernels": {"k": KERNEL | {"threads": 2048}}}, "cannot be launched",
    ),
    "no name": ({"operators": [3]}, r"is no index of kernels"),
}  # fmt: skip


@pytest.mark.parametrize("what", SPOILED)
def test_a_spoiled_index_is_one_sentence(tmp_path: Path, what: str) -> None:
    change, said = SPOILED[what]
    (tmp_path / "index.json").write_text(json.dumps({"schema": 1, "operators": [], "kernels": {}} | change))
    with pytest.raises(errors.TrtError, match=said):
        kernel_files.read_index(tmp_path)


def test_a_changed_kernel_is_refused(tmp_path: Path) -> None:
    from tests.kernels.test_plugins import TRAIN, write_index

    index = write_index(tmp_path, [TRAIN.kernel()], ["TTLinear2Bias"])
    (kernel,) = index.kernels.values()
    kernel.path.write_text(kernel.path.read_text() + "x")
    with pytest.raises(errors.TrtError, match=r"SHA-256 differs.*--no-kernels"):
        kernel.ptx()
