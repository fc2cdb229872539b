"""check_parity.py: an engine that computes what PyTorch computed passes, a changed weight is found and named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.runtimes_trt.faults import change_weight

VERSIONS = [("10.3", 6), ("10.16", 7), ("11.4", 7)]


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize(("version", "jetpack"), VERSIONS)
def test_build_then_parity_passes(
    tmp_path: Path, exports: Any, board: Any, capsys: pytest.CaptureFixture[str], version: str, jetpack: int, dtype: str
) -> None:
    folder = shutil.copytree(exports(jetpack, dtype), tmp_path / "out")
    device = board(version)
    for profiles in ("one", "two"):
        assert device("build_engine", folder, "--profiles", profiles) == 0
        assert device("check_parity", folder) == 0
        said = capsys.readouterr().out
        assert "PASSED" in said and "minimum tolerance that passes" in said and said.count(" ok ") == 3


def test_parity_through_a_cuda_graph(folder: Path, board: Any, capsys: pytest.CaptureFixture[str]) -> None:
    device = board()
    assert device("build_engine", folder) == 0
    assert device("check_parity", folder, "--cuda-graph", "--json") == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert device.cudart.launches > 0 and result["minimum_tolerance"] < 1e-4


@pytest.mark.parametrize(
    ("part", "where"),
    [
        ("layers.1.self_attn.k_proj", "keys of layer 1"),
        ("layers.0.self_attn.v_proj", "values of layer 0"),
        ("layers.1.mlp.down_proj", "keys of layer 2"),
        ("layers.2.mlp.up_proj", "the end: after the keys and values of layer 2"),
        ("embed_tokens", "keys of layer 1"),
    ],
)
def test_a_changed_weight_fails_and_is_named(
    folder: Path, board: Any, capsys: pytest.CaptureFixture[str], part: str, where: str
) -> None:
    change_weight(folder, part)
    device = board()
    assert device("build_engine", folder) == 0
    assert device("check_parity", folder) == 3
    assert f"FAILED (first diverging: {where}" in capsys.readouterr().out


def test_layer_outputs_name_the_block(folder: Path, board: Any, capsys: pytest.CaptureFixture[str]) -> None:
    device = board()
    assert device("build_engine", folder, "--layer-outputs") == 0
    assert device("check_parity", folder, "--layers") == 0
    capsys.readouterr()
    change_weight(folder, "layers.1.mlp.down_proj")
    assert device("build_engine", folder, "--layer-outputs") == 0
    assert device("check_parity", folder, "--layers") == 3
    assert "FAILED (first diverging: output of layer 1)" in capsys.readouterr().out


def test_tolerance_is_the_one_asked_for(folder: Path, board: Any, capsys: pytest.CaptureFixture[str]) -> None:
    device = board()
    assert device("build_engine", folder) == 0
    assert device("check_parity", folder, "--tolerance", "1e-12", "--json") == 3
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert not result["passed"] and 1e-12 < result["minimum_tolerance"] < 1e-4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--layers", "--cuda-graph"], "--layers and --cuda-graph exclude each other"),
        (["--tolerance", "5"], "--tolerance 5.0: give a relative L2 between 0 and 1"),
        (["--tolerance", "nan"], "--tolerance nan"),
    ],
)
def test_bad_options(folder: Path, board: Any, capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    device = board()
    assert device("build_engine", folder, "--layer-outputs") == 0
    assert device("check_parity", folder, *words) == 2
    assert said in capsys.readouterr().err


def test_a_stamp_that_names_other_outputs_is_refused(
    folder: Path, board: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    device = board()
    assert device("build_engine", folder, "--layer-outputs") == 0
    stamp = folder / "engine" / "sm87-trt10.3.0-layers" / "stamp.json"
    stamp.write_text(json.dumps(json.loads(stamp.read_text()) | {"layer_outputs": ["/nowhere"]}))
    assert device("check_parity", folder, "--layers") == 2
    assert "names an output '/nowhere'" in capsys.readouterr().err


def spoil_shape(golden: Path) -> None:
    np.save(golden / "prompt0.logits.npy", np.zeros((2, 3), np.float32))


def spoil_pickle(golden: Path) -> None:
    np.save(golden / "prompt0.logits.npy", np.array([{}], object), allow_pickle=True)


def spoil_json(golden: Path) -> None:
    (golden / "golden.json").write_text("[]")


def spoil_graph(golden: Path) -> None:
    data = json.loads((golden / "golden.json").read_text())
    (golden / "golden.json").write_text(json.dumps(data | {"graph": "0" * 64}))


def spoil_name(golden: Path) -> None:
    data = json.loads((golden / "golden.json").read_text())
    data["cases"][0]["name"] = "../../../etc/passwd"
    (golden / "golden.json").write_text(json.dumps(data))


def edit_json(golden: Path, **changes: Any) -> None:
    data = json.loads((golden / "golden.json").read_text())
    (golden / "golden.json").write_text(json.dumps(data | changes))


def spoil_cases(golden: Path) -> None:
    edit_json(golden, cases=[])


def spoil_tolerance(golden: Path) -> None:
    edit_json(golden, tolerance={"logits": float("inf"), "norms": 1e-4})


def spoil_count(golden: Path) -> None:
    edit_json(golden, cases=[{"name": "prompt0", "tokens": [1, 2], "prompt": float("inf")}])


def spoil_header(golden: Path) -> None:
    """A header that claims 2 TB."""
    with (golden / "prompt0.logits.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "<f4", "fortran_order": False, "shape": (1 << 20, 1 << 19)}
        )


def remove(golden: Path) -> None:
    shutil.rmtree(golden)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoil_shape, "has shapes"),
        (spoil_pickle, "cannot be read"),
        (spoil_json, "holds no JSON object"),
        (spoil_graph, "was recorded for another model.onnx"),
        (spoil_name, "etc/passwd"),
        (spoil_cases, "names no case"),
        (spoil_tolerance, "a tolerance of inf"),
        (spoil_count, "is no record of golden tensors"),
        (spoil_header, "cannot be read"),
        (remove, "export the model again without --no-verify"),
    ],
)
def test_a_bad_golden_folder_is_one_sentence(
    folder: Path, board: Any, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], None], said: str
) -> None:
    spoil(folder / "device" / "golden")
    assert board()("check_parity", folder) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
