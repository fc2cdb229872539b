"""build_engine.py and the stamp: what is built, what is refused, with which sentence and exit code."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mixt_export.building.toolkit import toolkit
from tests.runtimes_trt.fake_tensorrt import fake_tensorrt
from tests.runtimes_trt.faults import restamp

Edit = Callable[[dict[str, Any]], object]


def edit_manifest(folder: Path, edit: Edit) -> None:
    path = folder / "mixt_manifest.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))


def test_engine_and_stamp(folder: Path, board: Any, capsys: pytest.CaptureFixture[str]) -> None:
    device = board("10.3", capability=87)
    assert device("build_engine", folder, "--profiles", "two", "--workspace", "512M") == 0
    assert "built by TensorRT for SM87 10.3.0" in capsys.readouterr().out
    engine = folder / "engine" / "sm87-trt10.3.0"
    stamp = json.loads((engine / "stamp.json").read_text())
    plan = (engine / "model.engine").read_bytes()
    assert stamp["engine"] == {"file": "model.engine", "bytes": len(plan), "sha256": hashlib.sha256(plan).hexdigest()}
    assert stamp["graph"] == hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest()
    assert (stamp["library"], stamp["sm"], stamp["workspace_bytes"]) == ("10.3.0", 87, 512 << 20)
    manifest = json.loads((folder / "mixt_manifest.json").read_text())
    assert stamp["profiles"] == manifest["trt"]["profiles"] and len(stamp["profiles"]) == 2
    assert [path.name for path in (folder / "engine").iterdir()] == ["sm87-trt10.3.0"]


def test_one_profile_admits_what_two_admit(folder: Path) -> None:
    tools = toolkit("manifest")
    manifest = tools.read_manifest(folder)
    one = tools.merged(manifest.profiles)
    for profile in manifest.profiles:
        for name, (low, _, high) in profile.inputs.items():
            left, tuned, right = one.inputs[name]
            assert all(a <= b for a, b in zip(left, low, strict=True))
            assert all(a >= b for a, b in zip(right, high, strict=True))
            assert tuned == manifest.profiles[-1].inputs[name][1]
        assert one.admits({name: shapes[2] for name, shapes in profile.inputs.items()})
    longest = {name: shapes[2] for name, shapes in one.inputs.items()}
    assert longest["attention_mask"][1] == longest["input_ids"][1] + longest["past_key_values.0.key"][2]


def other_version(device: Any, folder: Path) -> None:
    device.version = "10.16"
    (folder / "engine" / "sm87-trt10.3.0").rename(folder / "engine" / "sm87-trt10.16.1.11")


def other_gpu(device: Any, folder: Path) -> None:
    device.cudart.capability = 110
    (folder / "engine" / "sm87-trt10.3.0").rename(folder / "engine" / "sm110-trt10.3.0")


def no_engine(device: Any, folder: Path) -> None:
    device.cudart.capability = 110


def other_graph(device: Any, folder: Path) -> None:
    onnx.save(onnx.load(folder / "model.onnx"), folder / "model.onnx")
    restamp(folder)


def changed_plan(device: Any, folder: Path) -> None:
    path = folder / "engine" / "sm87-trt10.3.0" / "model.engine"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def no_stamp(device: Any, folder: Path) -> None:
    (folder / "engine" / "sm87-trt10.3.0" / "stamp.json").unlink()


def bad_stamp(device: Any, folder: Path) -> None:
    (folder / "engine" / "sm87-trt10.3.0" / "stamp.json").write_text('{"schema": 1, "backend": "trt"}')


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (other_version, "was built for library 10.3.0, here it is 10.16.1.11; build it again"),
        (other_gpu, "was built for sm 87, here it is 110; build it again"),
        (no_engine, "there are engines for sm87-trt10.3.0, which do not load here"),
        (other_graph, "was built for graph"),
        (changed_plan, "is not the file that stamp.json describes"),
        (no_stamp, "no such file"),
        (bad_stamp, "is no stamp of an engine"),
    ],
)
def test_a_foreign_engine_is_refused(
    folder: Path, board: Any, capsys: pytest.CaptureFixture[str], change: Callable[[Any, Path], None], said: str
) -> None:
    device = board()
    assert device("build_engine", folder) == 0
    change(device, folder)
    capsys.readouterr()
    for script, words in (("check_parity", []), ("run", ["--ids", "1"])):
        assert device(script, folder, *words) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("faults", "code", "said"),
    [
        ({"build_warnings": ["Unused Input: nonpad"]}, 4, "leaves part of the graph out (Unused Input: nonpad)"),
        ({"parse_warnings": ["Unknown attribute: softcap"]}, 4, "leaves part of the graph out (Unknown attribute"),
        ({"parse_warnings": ["x.cpp:1: Attribute scale is ignored by node 3"]}, 4, "Attribute scale is ignored"),
        ({"build_error": "Error Code 2: OutOfMemory (Requested size was 9 bytes)"}, 5, "out of memory while building"),
        ({"build_error": "Could not find any implementation for node {x}"}, 5, "raise --workspace"),
        ({"build_error": "Error Code 10: Internal Error"}, 4, "cannot build an engine from it (Error Code 10"),
    ],
)
def test_failed_builds(
    folder: Path, board: Any, capsys: pytest.CaptureFixture[str], faults: dict[str, Any], code: int, said: str
) -> None:
    assert board(**faults)("build_engine", folder, "--workspace", "1M") == code
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (folder / "engine").exists()


def test_harmless_warnings_build(folder: Path, board: Any) -> None:
    harmless = ["ModelImporter.cpp:1071: Make sure input input_ids has Int64 binding."]
    assert board(parse_warnings=harmless)("build_engine", folder) == 0
    stamp = json.loads((folder / "engine" / "sm87-trt10.3.0" / "stamp.json").read_text())
    assert stamp["warnings"] == harmless


def test_a_newer_opset_names_node_and_remedy(
    tmp_path: Path, exports: Any, board: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(exports(7, "fp16"), tmp_path / "out")
    assert board("10.3")("build_engine", folder) == 4
    error = capsys.readouterr().err
    assert "node 0 '" in error and "opset 23" in error and "--jetpack" in error


def test_a_graph_of_another_dialect_names_the_node(
    folder: Path, board: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 2, 3, 4]) for name in ("q", "y", "p")]
    node = helper.make_node("Attention", ["q", "q", "q"], ["y", "p"], name="/model/layers.0/self_attn/Attention")
    graph = helper.make_graph([node], "g", values[:1], values[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), folder / "model.onnx")
    restamp(folder)
    assert board("10.3")("build_engine", folder) == 4
    error = capsys.readouterr().err
    assert "node 0 '/model/layers.0/self_attn/Attention' (Attention)" in error and "--target trt" in error


def scale(bound: str, value: int) -> Edit:
    def edit(manifest: dict[str, Any]) -> None:
        manifest["trt"]["profiles"][0]["inputs"]["input_ids"][bound][1] = value

    return edit


def flat_ids(manifest: dict[str, Any]) -> None:
    for profile in manifest["trt"]["profiles"]:
        profile["inputs"]["input_ids"] = {"min": [1], "opt": [1], "max": [1]}


def longer_mask(manifest: dict[str, Any]) -> None:
    for bounds in manifest["trt"]["profiles"][1]["inputs"]["attention_mask"].values():
        bounds[1] += 1000


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (scale("min", 999), "profile 'prefill' contradicts itself: input_ids has min [1, 999]"),
        (scale("opt", -3), "-3 is no size"),
        (longer_mask, "profile 'decode' contradicts itself: attention_mask has lengths"),
        (lambda m: m["trt"]["profiles"][0]["inputs"].pop("input_ids"), "lacks input_ids"),
        (lambda m: m["trt"]["profiles"][0]["inputs"].pop("past_key_values.1.key"), "profiles name different inputs"),
        (
            lambda m: [p["inputs"].pop("past_key_values.1.key") for p in m["trt"]["profiles"]],
            "says 3 layers, but its profiles name 7 inputs",
        ),
        (
            lambda m: [
                p["inputs"].update({"past_key_values.9.key": p["inputs"].pop("past_key_values.1.key")})
                for p in m["trt"]["profiles"]
            ],
            "profile does not name it",
        ),
        (lambda m: m["kv"].update(layers=2**31 - 1), "says 2147483647 layers"),
        (flat_ids, "input_ids and attention_mask have two dimensions"),
        (lambda m: m["trt"].update(profiles=[]), "no profiles"),
        (lambda m: m.pop("trt"), "was exported for target 'trt'; export the model with --target trt"),
        (lambda m: m.update(schema=9), "schema 9 is not 1"),
        (lambda m: m["kv"].update(heads="two"), "'two' is no size"),
        (lambda m: m.pop("kv"), "the field 'kv' is missing"),
        (lambda m: m["files"].update({"../secret": {"sha256": "0"}}), "'../secret' is no plain file name"),
        (lambda m: m["files"]["model.onnx"].update(sha256="0"), "is not the file that mixt_manifest.json describes"),
    ],
)
def test_bad_folders(folder: Path, board: Any, capsys: pytest.CaptureFixture[str], edit: Edit, said: str) -> None:
    edit_manifest(folder, edit)
    assert board()("build_engine", folder, "--profiles", "two") == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--sm", "86"], 4, "builds only for the GPU it runs on"),
        (["--backend", "abacus"], 2, "--backend abacus: not a backend; choose from rtx, trt"),
        (["--workspace", "much"], 2, "--workspace much: give a size such as 512M or 2G"),
        (["--workspace", "0"], 2, "--workspace 0"),
        (["--workspace", "²"], 2, "--workspace ²"),
        (["--workspace", "9999999999999G"], 2, "--workspace 9999999999999G"),
        (["--timing-cache", "/"], 2, "--timing-cache /: is a folder"),
        (["--backend", "rtx", "--timing-cache", "t"], 4, "--timing-cache: TensorRT-RTX does not support it: it times"),
        (["--backend", "rtx", "--hardware-compatible"], 4, "--hardware-compatible: TensorRT-RTX does not support it"),
    ],
)
def test_bad_options(
    folder: Path, board: Any, capsys: pytest.CaptureFixture[str], words: list[str], code: int, said: str
) -> None:
    assert board()("build_engine", folder, *words) == code
    assert said in capsys.readouterr().err


def test_timing_cache_is_read_extended_and_replaced_when_foreign(folder: Path, board: Any, tmp_path: Path) -> None:
    cache = tmp_path / "caches" / "board.cache"
    for expected in (b"+", b"++"):
        assert board()("build_engine", folder, "--timing-cache", cache) == 0
        assert cache.read_bytes() == expected
    cache.write_bytes(b"other")
    assert board()("build_engine", folder, "--timing-cache", cache) == 0
    assert cache.read_bytes() == b"+"


def test_compatibility_options_reach_the_config(folder: Path, board: Any) -> None:
    seen = []
    device = board("11.4")
    module = fake_tensorrt("11.4", device.cudart)
    create = module.Builder.build_serialized_network

    def build(self: Any, network: Any, config: Any) -> Any:
        seen.append(config)
        return create(self, network, config)

    module.Builder.build_serialized_network = build
    words = [str(folder), "--version-compatible", "--hardware-compatible", "--workspace", "2G"]
    cuda = toolkit("cuda").Cuda(device.cudart)
    assert device.scripts["build_engine"].main(words, module=module, cuda=cuda) == 0
    (config,) = seen
    assert [flag.name for flag in config._flags] == ["VERSION_COMPATIBLE"]
    assert [flag.name for flag in config._cleared] == ["TF32"]
    assert config.hardware_compatibility_level.name == "AMPERE_PLUS"
    assert {pool.name: size for pool, size in config._pools.items()} == {"WORKSPACE": 2 << 30}


def test_ctrl_c_ends_the_build_and_leaves_nothing(folder: Path, board: Any, capsys: pytest.CaptureFixture[str]) -> None:
    device = board()
    module = fake_tensorrt("10.3", device.cudart)
    original = module.IProgressMonitor

    class Pressed(original):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__()
            signal.raise_signal(signal.SIGINT)

    module.IProgressMonitor = Pressed
    before = signal.getsignal(signal.SIGINT)
    cuda = toolkit("cuda").Cuda(device.cudart)
    assert device.scripts["build_engine"].main([str(folder)], module=module, cuda=cuda) == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert "interrupted" in capsys.readouterr().err and not (folder / "engine").exists()


def test_a_full_disk(
    folder: Path, board: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(toolkit("stamp").shutil, "disk_usage", lambda _path: usage)
    assert board()("build_engine", folder) == 5
    assert "MB of disk" in capsys.readouterr().err and not list((folder / "engine").iterdir())


@pytest.mark.parametrize(("number", "code"), [(errno.EACCES, 2), (errno.ENOSPC, 5)])
@pytest.mark.parametrize("events", [False, True])
def test_a_folder_that_cannot_be_written(
    folder: Path, board: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int,
    code: int, events: bool,
) -> None:  # fmt: skip
    def refuse(**_: object) -> None:
        raise OSError(number, os.strerror(number), str(folder / "engine"))

    monkeypatch.setattr(toolkit("stamp").tempfile, "mkdtemp", refuse)
    assert board()("build_engine", folder, *["--events"] * events) == code
    found = capsys.readouterr()
    said = json.loads(found.out.splitlines()[-1])["error"] if events else found.err
    assert f"cannot read or write {folder / 'engine'}: {os.strerror(number)}." in said


def test_events_are_json_lines(folder: Path, board: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert board()("build_engine", folder, "--events") == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert events[-1]["engine"].endswith("sm87-trt10.3.0") and "phase" in events[0]
    assert board("11.4", capability=110)("build_engine", folder, "--events", "--sm", "86") == 4
    (event,) = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert event["exit_code"] == 4 and "--sm 86" in event["error"]


def test_weights_are_read_from_beside_the_graph(folder: Path, board: Any) -> None:
    """The parser gets a path: external data must be found whatever the working directory is."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    external = [tensor for tensor in model.graph.initializer if tensor.external_data]
    assert external and all(numpy_helper.to_array(t, str(folder)).dtype != np.object_ for t in external)
    assert board()("build_engine", folder) == 0
