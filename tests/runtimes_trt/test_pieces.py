"""Small parts of the device bundle: the log reader, the trtexec command, what files may import."""

from __future__ import annotations

import ast
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from mixt_export.building.toolkit import bundle_folder, toolkit
from tests.runtimes.test_folder import imported

#: As printed by TensorRT-RTX 1.7.1 for an engine of two profiles.
LINES = """Total Host Persistent Memory: 80 bytes
Total Device Persistent Memory: 0 bytes
Max Scratch Memory: 22128640 bytes
[BlockAssignment] Algorithm ShiftNTopDown took 0.037832ms to assign 1 blocks to 1 nodes requiring 22128640 bytes.
Total Activation Memory: 22128640 bytes
Total Host Persistent Memory: 80 bytes
Total Device Persistent Memory: 0 bytes
Max Scratch Memory: 8293376 bytes
Total Activation Memory: 8293376 bytes
Total Weights Memory: 213248 bytes"""


def test_log_figures_per_profile() -> None:
    log = toolkit("log").Log()
    for line in LINES.splitlines():
        log.add("INFO", line)
    figures = log.figures()
    assert figures["weights_bytes"] == 213248
    assert [profile["activation_bytes"] for profile in figures["profiles"]] == [22128640, 8293376]
    assert all(profile["host_persistent_bytes"] == 80 for profile in figures["profiles"])
    empty = toolkit("log").Log()
    empty.add("INFO", "nothing of interest")
    assert empty.figures() == {"weights_bytes": None, "profiles": []}


def test_log_keeps_no_verbose_messages() -> None:
    log = toolkit("log").Log()
    log.add("VERBOSE", "Unused Input: x")
    log.add("ERROR", "bad")
    assert log.traps() == [] and log.errors == ["bad"]


@pytest.mark.parametrize(("version", "strong"), [("10.3", True), ("10.16", True), ("11.4", False)])
def test_trtexec_command(version: str, strong: bool) -> None:
    tools = toolkit("manifest")

    def profile(name: str, length: int) -> object:
        shapes = {
            "input_ids": {"min": [1, 1], "opt": [1, length], "max": [2, length]},
            "attention_mask": {"min": [1, 1], "opt": [1, length], "max": [2, 64]},
            "past_key_values.0.key": {"min": [1, 2, 0, 4], "opt": [1, 2, 0, 4], "max": [2, 2, 64 - length, 4]},
        }
        return tools.parse_profile({"name": name, "inputs": shapes})

    command = toolkit("trtexec").trtexec_command(version, [profile("prefill", 16), profile("decode", 1)], 3 << 30)
    words = command.replace(" \\\n  ", " ").split()
    assert words[:2] == ["trtexec", "--onnx=model.onnx"] and ("--stronglyTyped" in words) == strong
    assert "--memPoolSize=workspace:3072M" in words and not any("fp16" in word for word in words)
    first, second = words.index("--profile=0"), words.index("--profile=1")
    assert "--maxShapes=input_ids:2x16,attention_mask:2x64,past_key_values.0.key:2x2x48x4" in words[first:second]
    assert "--minShapes=input_ids:1x1,attention_mask:1x1,past_key_values.0.key:1x2x0x4" in words[second:]


def sources() -> list[Path]:
    """What travels: the sources of kernels do not."""
    return sorted(path for path in bundle_folder().rglob("*.py") if "kernels" not in path.parts)


def test_the_bundle_imports_nothing_else() -> None:
    allowed = {"numpy", "mixt_trt", "mixt_ort", ""} | set(sys.stdlib_module_names)
    assert {"build_engine.py", "check_parity.py", "run.py", "builder.py"} <= {path.name for path in sources()}
    for path in sources():
        foreign = imported(path.read_text(encoding="utf-8")) - allowed
        assert not foreign, f"{path} imports {foreign}"


def test_the_bundle_is_python_3_10() -> None:
    """JetPack 6 ships Python 3.10."""
    for path in sources():
        ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 10))


def test_files_out_of_the_folder_are_not_read(tmp_path: Path) -> None:
    """Links that lead out or in a circle, pipes, names without end; links of the Hugging Face cache are followed."""
    tools, error = toolkit("manifest"), toolkit("errors").TrtError
    folder = tmp_path / "snapshots" / "main" / "device"
    (tmp_path / "blobs").mkdir()
    folder.mkdir(parents=True)
    for place in (tmp_path / "outside.json", tmp_path / "blobs" / "0", folder / "within.json"):
        place.write_text('{"a": 1}')
    path = folder / "x.json"
    for target in ("within.json", "../../../blobs/0"):
        path.symlink_to(target)
        assert tools.read_json(path) == {"a": 1}
        path.unlink()
    digest = toolkit("manifest").digest
    for target, said in (("../../../outside.json", "leads out of the folder"), ("x.json", "cannot be read|no such")):
        path.symlink_to(target)
        for read in (tools.read_json, digest, toolkit("golden")._array):
            with pytest.raises(error, match=said):
                read(path)
        path.unlink()
    os.mkfifo(path)
    for read in (tools.read_json, digest, toolkit("golden")._array):
        with pytest.raises(error, match="is no file"):
            read(path)
        with pytest.raises(error, match=r"cannot be read|no such"):
            read(folder / ("x" * 5000))


def test_a_golden_array_is_an_npy_file(tmp_path: Path) -> None:
    error, path = toolkit("errors").TrtError, tmp_path / "x.npy"
    np.save(path, np.ones(3, np.float32))
    assert toolkit("golden")._array(path).tolist() == [1, 1, 1]
    with path.open("wb") as file:
        np.savez(file, x=np.ones(3, np.float32))
    for content in (path.read_bytes(), b"PK\x03\x04", b"\x80\x04.", b""):
        path.write_bytes(content)
        with pytest.raises(error, match="cannot be read"):
            toolkit("golden")._array(path)


def test_leftovers_of_killed_builds(tmp_path: Path) -> None:
    """Folders go; what is no folder, or is locked by a build that runs, stays and is not waited for."""
    stamp = toolkit("stamp")
    (tmp_path / ".tmp-left").mkdir()
    (tmp_path / ".tmp-running").mkdir()
    os.mkfifo(tmp_path / ".tmp-pipe")
    (tmp_path / ".tmp-link").symlink_to(tmp_path)
    lock = stamp._locked(tmp_path / ".tmp-running")
    assert stamp._locked(tmp_path / ".tmp-gone") is None
    stamp._clear_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tmp-link", ".tmp-pipe", ".tmp-running"]
    os.close(lock)
