"""Plans really built by TensorRT-RTX, on the CPU, each in a process of its own. Nothing here runs on a GPU."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mixt_export.building import build_engine
from mixt_export.checkpoints import open_checkpoint
from mixt_export.errors import ResourceError, UnsupportedError, UsageError
from mixt_export.plan import forms_of
from mixt_export.quantisation import Quantisation
from mixt_export.targets import export
from mixt_export.targets.trt import TrtOptions
from tests.building.models import STRUCTURES, write_structure
from tests.runtimes_trt.faults import restamp

#: Each structure in both dialects; the pairs cover one and two profiles, SM86 and SM120.
CASES = [
    (structure, jetpack, *how)
    for number, structure in enumerate(STRUCTURES)
    for jetpack, how in zip((6, 7), [("one", 86), ("two", 120)][:: 1 - 2 * (number % 2)], strict=True)
]  # fmt: skip


def exported(folder: Path, structure: str, jetpack: int, dtype: str = "fp16") -> Path:
    """A folder whose graph executes the cores as stored, whatever the planner would merge."""
    options = TrtOptions(jetpack=jetpack, max_input_len=16)
    model = write_structure(folder / "source", structure)
    factors = open_checkpoint(model).factors
    forms = [(f"^{re.escape(name)}$", forms_of(linear)[0].name) for name, linear in factors.items()]
    export(model, folder / "out", target="trt", dtype=dtype, max_seq_len=64, trt=options, verify=False, forms=forms)
    (folder / "out" / "device" / "golden").mkdir()
    (folder / "out" / "device" / "golden" / "golden.json").write_text("{}")
    return folder / "out"


@pytest.mark.parametrize(("structure", "jetpack", "profiles", "sm"), CASES)
def test_every_structure_is_parsed_and_compiled(
    tmp_path: Path, structure: str, jetpack: int, profiles: str, sm: int
) -> None:
    out = exported(tmp_path, structure, jetpack)
    report = build_engine(out, backend="rtx", sm=sm, profiles=profiles)
    assert report.claim == f"parsed and compiled by TensorRT-RTX (SM{sm} proxy)"
    assert report.engine == out / "engine" / f"sm{sm}-rtx{report.library}"
    stamp = json.loads((report.engine / "stamp.json").read_text())
    assert (report.engine / "model.engine").stat().st_size == report.nbytes == stamp["engine"]["bytes"]
    assert len(stamp["profiles"]) == {"one": 1, "two": 2}[profiles]
    assert len(report.log_memory["profiles"]) == len(stamp["profiles"])
    assert all(profile["activation_bytes"] > 0 for profile in report.log_memory["profiles"])
    assert report.log_memory["weights_bytes"] > 0 and report.layers > 50


@pytest.mark.parametrize(("bits", "jetpack"), [(8, 6), (8, 7), (4, 7)])
def test_integers_stay_integers_in_a_plan(tmp_path: Path, bits: int, jetpack: int) -> None:
    """Not widened while the plan is built: its weights take what the folder's take, about half of float16's or less."""
    model = write_structure(tmp_path / "source", "dense")
    sizes = {}
    few = Quantisation(bits, 16 if bits == 4 else None, rounding="nearest", measure=False)
    for name, quantisation in (("float", None), ("few", few)):
        result = export(
            model, tmp_path / name, target="trt", dtype="fp16", max_seq_len=64, verify=False,
            trt=TrtOptions(jetpack=jetpack, max_input_len=16), quantisation=quantisation,
        )  # fmt: skip
        (tmp_path / name / "device" / "golden").mkdir()
        (tmp_path / name / "device" / "golden" / "golden.json").write_text("{}")
        report = build_engine(tmp_path / name, backend="rtx", sm=86, profiles="one")
        assert report.claim == "parsed and compiled by TensorRT-RTX (SM86 proxy)"
        sizes[name] = report.log_memory["weights_bytes"]
        assert sizes[name] < 1.1 * result.manifest["memory"]["weight_bytes"]
    matrices = result.manifest["quantisation"]["matrices"].values()
    floats = 2 * sum(each["shape"][0] * each["shape"][1] for each in matrices)
    assert sizes["few"] < sizes["float"] - 0.4 * floats


def test_a_train_decodes_one_token_exactly(tmp_path: Path) -> None:
    """Permuted axes with one of size 1 among them crash the compiler; batch and positions are one axis for that."""
    out = exported(tmp_path, "tensor_train", 6)
    path = out / "mixt_manifest.json"
    manifest = json.loads(path.read_text())
    decode = manifest["trt"]["profiles"][1]["inputs"]
    for name in ("input_ids", "attention_mask"):
        decode[name]["max"][1] -= 1
    assert decode["input_ids"]["max"] == [1, 1]
    path.write_text(json.dumps(manifest))
    assert build_engine(out, backend="rtx", profiles="two").nbytes > 0


def test_a_workspace_that_is_too_small(tmp_path: Path) -> None:
    out = exported(tmp_path, "dense", 7)
    with pytest.raises(ResourceError, match=r"the workspace of 1 bytes is too small for a layer .*raise --workspace"):
        build_engine(out, backend="rtx", workspace="1")
    assert not (out / "engine").exists()


def test_bfloat16_and_layer_outputs(tmp_path: Path) -> None:
    out = exported(tmp_path, "mixt", 7, "bf16")
    report = build_engine(out, backend="rtx", layer_outputs=True)
    assert report.engine.name.endswith("-layers")
    assert json.loads((report.engine / "stamp.json").read_text())["layer_outputs"] == ["/model/layers.0/output"]


def hand_made(folder: Path, *nodes: onnx.NodeProto, left: int = TensorProto.FLOAT16) -> Path:
    """An exported folder whose graph is ``nodes``, from x (batch, 4) and w (4, 4) of type ``left`` to y."""
    out = exported(folder, "dense", 7)
    info = helper.make_tensor_value_info
    inputs = [info("x", left, ["batch", 4])]
    weight = numpy_helper.from_array(np.ones((4, 4), np.float16), "w")
    graph = helper.make_graph(list(nodes), "g", inputs, [info("y", left, None)], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), out / "model.onnx")
    restamp(out)
    return out


def node(kind: str, inputs: list[str], outputs: list[str], **attributes: object) -> onnx.NodeProto:
    return helper.make_node(kind, inputs, outputs, name=f"/block/{kind}", **attributes)


def test_an_operator_that_tensorrt_lacks(tmp_path: Path) -> None:
    out = hand_made(tmp_path, node("NonZero", ["x"], ["y"]))
    with pytest.raises(UnsupportedError, match=r"node 0 '/block/NonZero' \(NonZero\).*no such operator.*--jetpack"):
        build_engine(out, backend="rtx")
    assert not (out / "engine").exists()


def test_mixed_types_in_a_product(tmp_path: Path) -> None:
    out = hand_made(tmp_path, node("MatMul", ["x", "w"], ["y"]), left=TensorProto.FLOAT)
    with pytest.raises(UnsupportedError, match=r"'/block/MatMul' \(MatMul\).*mixes types"):
        build_engine(out, backend="rtx")


_DYNAMIC = ("input_ids", "attention_mask")


def test_an_input_that_tensorrt_drops(tmp_path: Path) -> None:
    """Attention's nonpad_kv_seqlen is parsed and then ignored: a wrong result unless it is an error."""
    out = exported(tmp_path, "dense", 7)
    shapes: dict[str, tuple[int, list[list[int]]]] = {
        "input_ids": (TensorProto.INT64, [[1, 1], [1, 1], [1, 1]]),
        "attention_mask": (TensorProto.INT64, [[1, 2], [1, 9], [1, 9]]),
        "past_key_values.0.key": (TensorProto.FLOAT16, [[1, 4, 1, 16], [1, 4, 8, 16], [1, 4, 8, 16]]),
        "past_key_values.0.value": (TensorProto.FLOAT16, [[1, 4, 1, 16], [1, 4, 8, 16], [1, 4, 8, 16]]),
        "past_key_values.1.key": (TensorProto.FLOAT16, [[1, 4, 1, 16], [1, 4, 8, 16], [1, 4, 8, 16]]),
        "lengths": (TensorProto.INT64, [[1], [1], [1]]),
    }
    info = helper.make_tensor_value_info
    inputs = [
        info(name, kind, [f"{name}{at}" if name in _DYNAMIC or at == 2 else size for at, size in enumerate(low)])
        for name, (kind, (low, _, _)) in shapes.items()
    ]
    query, key, value = "past_key_values.1.key", "past_key_values.0.key", "past_key_values.0.value"
    attention = node("Attention", [query, key, value, "", "", "", "lengths"], ["y"])
    graph = helper.make_graph([attention], "g", inputs, [info("y", TensorProto.FLOAT16, None)])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10), out / "model.onnx")
    restamp(out)
    path = out / "mixt_manifest.json"
    manifest = json.loads(path.read_text())
    bounds = {name: dict(zip(("min", "opt", "max"), sizes, strict=True)) for name, (_, sizes) in shapes.items()}
    manifest["trt"]["profiles"] = [{"name": "decode", "inputs": bounds}]
    path.write_text(json.dumps(manifest))
    with pytest.raises(UnsupportedError, match=r"leaves part of the graph out .*Unused Input: lengths"):
        build_engine(out, backend="rtx")


def test_targets_that_only_the_device_can_build(tmp_path: Path) -> None:
    out = exported(tmp_path, "dense", 6)
    for sm in (87, 110):
        with pytest.raises(UnsupportedError, match=f"SM{sm} cannot be built here.*build on the device"):
            build_engine(out, backend="rtx", sm=sm)


def test_a_profile_that_contradicts_itself(tmp_path: Path) -> None:
    out = exported(tmp_path, "dense", 6)
    path = out / "mixt_manifest.json"
    manifest = json.loads(path.read_text())
    manifest["trt"]["profiles"][0]["inputs"]["input_ids"]["min"] = [1, 99]
    path.write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match="contradicts itself"):
        build_engine(out, backend="rtx")


def test_a_profile_that_names_another_input(tmp_path: Path) -> None:
    out = hand_made(tmp_path, node("MatMul", ["x", "w"], ["y"]))
    with pytest.raises(UsageError, match="does not fit the graph"):
        build_engine(out, backend="rtx")
