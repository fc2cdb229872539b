"""Quantised exports: what is in the folder, that it computes what its integers say, and that faults are found."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from mixt_export.checkpoints import NewTensor, open_checkpoint, write_checkpoint
from mixt_export.errors import UnsupportedError, UsageError
from mixt_export.network import TensorRef, build
from mixt_export.progress import SILENT
from mixt_export.quantisation import Quantisation
from mixt_export.reference.linear import linear_module
from mixt_export.targets import export
from mixt_export.targets.rewriting import Rewriting
from mixt_export.targets.trt import TrtOptions
from mixt_export.verification import verify
from mixt_export.verification.checks import int8_activations, quantised_weights, redensified, teacher_forced
from mixt_export.verification.context import Context
from mixt_export.verification.options import VerifyOptions
from tests.flips import flipped, with_flips
from tests.tiny import write_tiny, write_tiny_low_rank

NEAREST: dict[str, Any] = {"group": 16, "rounding": "nearest", "measure": False}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("dense") / "model", num_hidden_layers=2)


def context_of(out: Path, source: Path) -> Context:
    return Context(out, source, VerifyOptions(positions=32, memory=False, write=False, threads=1), SILENT)


def quantised(source: Path, out: Path, kind: str, target: str = "ort", **options: Any) -> dict[str, Any]:
    settings = Quantisation.named(kind, **{**NEAREST, **options})
    result = export(source, out, target=target, quantisation=settings, verify=False, overwrite=True)
    entry: dict[str, Any] = result.manifest["quantisation"]
    return entry


@pytest.mark.parametrize(("kind", "target"), [("int4", "ort"), ("int8", "ort"), ("int4", "onnx"), ("int8", "onnx")])
def test_logits_are_those_of_pytorch_with_the_integers(dense: Path, tmp_path: Path, kind: str, target: str) -> None:
    entry = quantised(dense, tmp_path / "out", kind, target)
    assert len(entry["matrices"]) > 10
    context = context_of(tmp_path / "out", dense)
    for check in (quantised_weights, teacher_forced, *([int8_activations, redensified] if target == "ort" else [])):
        result = check.run(context)
        assert result.passed, result


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_quantised_matrices_count_as_the_numbers_they_stand_for(dense: Path, tmp_path: Path, kind: str) -> None:
    """Neither scales nor pairs of codes in a byte make the graph larger or smaller than the model folder."""
    quantised(dense, tmp_path / "out", kind)
    found = redensified.run(context_of(tmp_path / "out", dense)).metrics
    small = 0.01 * found["planned_constants"]  # tables of rotary angles
    assert abs(found["constants"] - found["planned_constants"]) < small + 256 * 16


@pytest.mark.parametrize("bits", [4, 8])
def test_both_factors_of_a_low_rank_linear_are_quantised(dense: Path, tmp_path: Path, bits: int) -> None:
    """Ranks 17 and 20 end in a short block."""
    source = write_tiny_low_rank(tmp_path / "model", dense, {"q_proj": 17, "down_proj": 20, "up_proj": 16})
    settings = Quantisation(bits, 16, 8, "nearest", measure=False, min_elements=256)
    entry = export(source, tmp_path / "out", quantisation=settings, verify=False).manifest["quantisation"]
    names = list(entry["matrices"])
    assert any("core0" in name for name in names)
    assert any("core1" in name for name in names)
    context = context_of(tmp_path / "out", source)
    for check in (quantised_weights, teacher_forced, int8_activations):
        result = check.run(context)
        assert result.passed, result


def test_int4_leaves_the_mlps_last_linear_and_second_factors_at_8_bits(dense: Path, tmp_path: Path) -> None:
    """--int8-for names others, or none."""
    source = write_tiny_low_rank(tmp_path / "model", dense, {"down_proj": 28, "gate_proj": 24})

    def wide(**options: Any) -> set[str]:
        entry = quantised(source, tmp_path / "out", "int4", **options)
        return {name for name, each in entry["matrices"].items() if each["bits"] == 8 and "embed" not in name}

    # The second factor of down_proj has fewer elements than a matrix worth quantising, as has the first of gate_proj.
    layers = [f"model.layers.{index}.mlp" for index in (0, 1)]
    assert wide() == {f"{mlp}.{part}" for mlp in layers for part in ("down_proj.core0", "gate_proj.core1")}
    for check in (quantised_weights, teacher_forced, int8_activations):
        result = check.run(context_of(tmp_path / "out", source))
        assert result.passed, result
    assert wide(int8_for=("none",)) == set()
    assert wide(int8_for=(r"layers\.0\.mlp\.up_", "o_proj")) == {
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.0.self_attn.o_proj.weight",
        "model.layers.1.self_attn.o_proj.weight",
    }


def test_what_no_expression_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--int8-for \(: is no regular expression"):
        Quantisation.named("int4", int8_for=("(",))


def test_a_factorised_linear_in_its_dense_form_is_quantised(dense: Path, tmp_path: Path) -> None:
    """Its integers stand for a matrix that the folder does not hold; it is not square, so no transpose hides."""
    source = write_tiny_low_rank(tmp_path / "model", dense, {"up_proj": 16})
    settings = Quantisation(8, 16, 8, "nearest", measure=False)
    plan = export(source, tmp_path / "out", quantisation=settings, forms=[("up_proj", "dense")], verify=False)
    assert "model.layers.0.mlp.up_proj.dense" in plan.manifest["quantisation"]["matrices"]
    context = context_of(tmp_path / "out", source)
    for check in (quantised_weights, teacher_forced):
        result = check.run(context)
        assert result.passed, result


def test_a_core_that_other_matrices_are_made_of_stays_float(dense: Path, tmp_path: Path) -> None:
    """Tucker heads: q_proj reads u1 as it lies, o_proj a turned copy of it."""
    name = "model.layers.1.self_attn"
    linears = [
        build.tucker_heads(f"{name}.{kind}_proj", kind, 48, 4, 16, (10, 7, 2), shared=name, kv_heads=2)
        for kind in "qkvo"
    ]
    rng = np.random.default_rng(0)
    tensors = [
        NewTensor(core.name, "float32", core.shape, rng.standard_normal(core.shape).astype(np.float32).copy)
        for core in {core.name: core for linear in linears for core in linear.core_tensors()}.values()
    ]
    source = tmp_path / "model"
    source.mkdir()
    write_checkpoint(source, open_checkpoint(dense), tensors, {linear.name: linear for linear in linears}, {})
    settings = Quantisation(8, 16, 8, "nearest", measure=False, min_elements=256)
    manifest = export(source, tmp_path / "out", quantisation=settings, verify=False).manifest
    assert f"{name}.u1" not in manifest["quantisation"]["matrices"]
    result = teacher_forced.run(context_of(tmp_path / "out", source))
    assert result.passed, result


@pytest.mark.parametrize("turned", [False, True])
def test_every_product_of_a_chain_rounds_what_it_reads(turned: bool) -> None:
    """Whichever way round its matrices are stored."""
    import torch

    from mixt_export.verification.int8_activations import _rounding_branch
    from mixt_export.verification.quantised import Matrix
    from tests.quantisation import oracle

    rng = np.random.default_rng(2)
    down, up = (rng.standard_normal(shape).astype(np.float32) for shape in ((45, 20), (20, 33)))
    linear = build.low_rank("l", 45, 33, 20)
    linear = with_flips(linear, [turned, turned])
    stored = (down.T.copy(), up.T.copy()) if turned else (down, up)
    cores = dict(zip((core.name for core in linear.core_tensors()), map(torch.from_numpy, stored), strict=True))
    module = linear_module(linear, lambda name: torch.nn.Parameter(cores[name]), lambda _name: torch.empty(0))
    x = rng.standard_normal((5, 45)).astype(np.float32)
    empty = onnx.TensorProto()
    matrix = Matrix("m", 1, 1, False, 8, 16, ("m",), False, 0.0, 0.0, Path(), empty, empty)
    rounding = _rounding_branch(module, dict.fromkeys(cores, matrix), [5])
    found = rounding(linear.branches[0], torch.from_numpy(x)).detach().numpy()
    hidden = (oracle.rounded_rows(x, 16) @ down).astype(np.float32)
    expected = oracle.rounded_rows(hidden, 16) @ up
    assert np.linalg.norm(found - expected) < 1e-3 * np.linalg.norm(expected)
    assert np.linalg.norm(x @ down @ up - expected) > 3e-3 * np.linalg.norm(expected)


def test_calibration_is_repeatable_and_closer(dense: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"rounding": "calibrated", "measure": True}
    first = quantised(dense, tmp_path / "a", "int4", **settings)
    quantised(dense, tmp_path / "b", "int4", **settings)
    plain = quantised(dense, tmp_path / "c", "int4", measure=True)
    assert (tmp_path / "a/model.onnx.data").read_bytes() == (tmp_path / "b/model.onnx.data").read_bytes()
    assert first["loss"]["kl"] < 0.8 * plain["loss"]["kl"]
    assert not list((tmp_path / "a").glob(".rounding*"))


def test_the_table_is_stored_once(dense: Path, tmp_path: Path) -> None:
    quantised(dense, tmp_path / "out", "int4", head="int4")
    proto = onnx.load_model(str(tmp_path / "out/model.onnx"), load_external_data=False)
    places = {
        tensor.name: next(entry.value for entry in tensor.external_data if entry.key == "offset")
        for tensor in proto.graph.initializer
        if tensor.name.startswith("model.embed_tokens.weight.int4")
    }
    assert len(places) == 2
    assert len(set(places.values())) == 1
    assert not list((tmp_path / "out").glob("*.safetensors"))


Fault = Callable[[bytearray, dict[str, tuple[int, int]]], None]


def _flip(data: bytearray, at: dict[str, tuple[int, int]]) -> None:
    data[at["q_codes"][0] + 7] ^= 0x30


def _swap_scales(data: bytearray, at: dict[str, tuple[int, int]]) -> None:
    (a, n), (b, _) = at["q_scales"], at["o_scales"]
    data[a : a + n // 2], data[b : b + n // 2] = data[b : b + n // 2], data[a : a + n // 2]


def _swap_halves(data: bytearray, at: dict[str, tuple[int, int]]) -> None:
    a, n = at["q_codes"]
    for index in range(a, a + n):
        data[index] = (data[index] >> 4) | ((data[index] & 15) << 4)


def _zero_point(data: bytearray, at: dict[str, tuple[int, int]]) -> None:
    a, n = at["q_codes"]
    for index in range(a, a + n):
        data[index] = (data[index] & 0xF0) | ((data[index] + 1) & 15)


@pytest.mark.parametrize("fault", [_flip, _swap_scales, _swap_halves, _zero_point])
def test_corrupt_integers_are_found_and_their_linear_named(dense: Path, tmp_path: Path, fault: Fault) -> None:
    out = tmp_path / "out"
    quantised(dense, out, "int4")
    proto = onnx.load_model(str(out / "model.onnx"), load_external_data=False)
    places: dict[str, tuple[int, int]] = {}
    for tensor in proto.graph.initializer:
        for short in ("q", "o"):
            stem = f"model.layers.1.self_attn.{short}_proj.weight."
            if tensor.name.startswith(stem):
                entry = {item.key: item.value for item in tensor.external_data}
                kind = "scales" if tensor.name.endswith("scales") else "codes"
                places[f"{short}_{kind}"] = int(entry["offset"]), int(entry["length"])
    data = bytearray((out / "model.onnx.data").read_bytes())
    fault(data, places)
    (out / "model.onnx.data").write_bytes(data)
    result = quantised_weights.run(context_of(out, dense))
    assert not result.passed
    assert "model.layers.1.self_attn" in result.where


def test_swapped_tensors_are_found(dense: Path, tmp_path: Path) -> None:
    quantised(dense, tmp_path / "out", "int4")
    path = tmp_path / "out/mixt_manifest.json"
    text = path.read_text()
    manifest = json.loads(text)
    gate, up = (f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up"))
    matrices = manifest["quantisation"]["matrices"]
    matrices[gate]["parts"], matrices[up]["parts"] = matrices[up]["parts"], matrices[gate]["parts"]
    path.write_text(json.dumps(manifest))
    result = quantised_weights.run(context_of(tmp_path / "out", dense))
    assert not result.passed
    assert "mlp" in result.where


def test_emulated_rounding_is_that_of_the_oracle() -> None:
    import torch

    from mixt_export.verification.int8_activations import rounded_blocks
    from tests.quantisation import oracle

    x = np.random.default_rng(0).standard_normal((5, 45)).astype(np.float32)
    x[2] = 0
    found = rounded_blocks(torch.from_numpy(x), 16).numpy()
    assert np.allclose(found, oracle.rounded_rows(x, 16), rtol=0, atol=1e-6)


def test_options_that_do_not_go_together_are_refused(dense: Path, tmp_path: Path) -> None:
    settings = Quantisation.named("int4", **NEAREST)
    with pytest.raises(UsageError, match="on a CPU activations are float32"):
        export(dense, tmp_path / "out", dtype="fp16", quantisation=settings, verify=False)
    with pytest.raises(UsageError, match="--memory-budget counts weights before"):
        export(dense, tmp_path / "out", memory_budget=10**9, quantisation=settings, verify=False)
    with pytest.raises(UsageError, match="--quantize --variants one: the two forms of a linear"):
        export(dense, tmp_path / "out", variants="one", quantisation=settings, verify=False)
    with pytest.raises(UnsupportedError, match=r"--quantize int4: blocks of 4 bits .* choose --quantize int8"):
        export(dense, tmp_path / "out", target="trt", trt=TrtOptions(jetpack=6), quantisation=settings, verify=False)
    with pytest.raises(UsageError, match="--group 48"):
        Quantisation.named("int4", 48)
    with pytest.raises(UsageError, match="--quantize int3"):
        Quantisation.named("int3")
    assert not (tmp_path / "out").exists()


def write_flipped(folder: Path, source: Path) -> Path:
    """The low rank model ``source`` with factors (rank, in) and (out, rank) under the names of a foreign format."""
    checkpoint = open_checkpoint(source)
    names = {"core0": "BLinear.weight", "core1": "ALinear.weight"}
    factors, tensors = {}, []
    for name, linear in checkpoint.factors.items():
        (branch,) = linear.branches
        cores = []
        for core in branch.cores:
            old = core.tensor.name
            new, shape = f"{name}.{names[old.rpartition('.')[2]]}", core.tensor.shape[::-1]
            tensors.append(NewTensor(new, "float32", shape, lambda old=old: checkpoint.store.read(old, "float32").T))
            cores.append(replace(flipped(core), tensor=TensorRef(new, shape, "float32")))
        factors[name] = replace(linear, branches=(replace(branch, cores=tuple(cores)),))
    folder.mkdir()
    write_checkpoint(folder, checkpoint, tensors, factors, {})
    return folder


@pytest.mark.parametrize("turn", [True, False])
@pytest.mark.parametrize(
    "options", [{"name": "int8"}, {"name": "int8", "activations": "int8"}, {"name": "int4", "rounding": "calibrated"}]
)
def test_factors_of_foreign_formats(tmp_path: Path, text: Path, options: dict[str, str], turn: bool) -> None:
    """The other way round and under other names: integers like ours, proven; int4 keeps the same at 8 bits."""
    ours = write_tiny_low_rank(tmp_path / "ours", write_tiny(tmp_path / "base", num_hidden_layers=2), 19)
    theirs = write_flipped(tmp_path / "theirs", ours)
    asked = replace(Quantisation.named(**options, texts=(text,), measure=False), min_elements=256, group=16)
    found = []
    for source in (ours, theirs):
        out = tmp_path / f"{source.name} out"
        export(source, out, quantisation=asked, rewriting=Rewriting(turn=turn), verify=False)
        listed = json.loads((out / "mixt_manifest.json").read_text())["quantisation"]["matrices"]
        found.append(sorted((tuple(each["shape"]), each["bits"], each.get("activations")) for each in listed.values()))
        assert sum("core" in name or "Linear" in name for name in listed) == 28
        report = verify(out, source, options=VerifyOptions(positions=32, memory=False, write=False, threads=1))
        assert report.passed, [check.reason for check in report.checks if not check.passed]
    assert found[0] == found[1]
