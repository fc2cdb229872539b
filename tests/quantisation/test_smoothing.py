"""Products of int8 activations: the operator against an oracle, smoothing that changes nothing, faults, refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from safetensors.numpy import load_file, save_file

from mixt_export.checkpoints import open_checkpoint, write_checkpoint
from mixt_export.errors import UnsupportedError, UsageError
from mixt_export.progress import SILENT
from mixt_export.quantisation import Quantisation
from mixt_export.quantisation.cache import Int8Cache
from mixt_export.quantisation.calibration import logits_of
from mixt_export.quantisation.smoothing import FILE, factors_of
from mixt_export.targets import export
from mixt_export.targets.calibrate import FloatGraph, calibrate_smoothing
from mixt_export.targets.export import plan_export
from mixt_export.verification import verify
from mixt_export.verification.checks import far, int8_activations, int8_cache, quantised_weights, teacher_forced
from mixt_export.verification.context import Context
from mixt_export.verification.locate import locate
from mixt_export.verification.options import VerifyOptions
from mixt_export.verification.routes import Pieces
from tests.quantisation import oracle
from tests.tiny import write_tiny, write_tiny_low_rank, write_tiny_mixt
from tests.verbs import run_verb

OPTIONS = VerifyOptions(positions=32, memory=False, write=False, threads=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model") / "model", num_hidden_layers=2)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, model: Path, text: Path) -> Path:
    out = tmp_path_factory.mktemp("exported") / "out"
    export(model, out, quantisation=settings(text), verify=False)
    return out


def settings(text: Path, **options: Any) -> Quantisation:
    """Of tiny models every matrix counts."""
    named = Quantisation.named("int8", texts=(text,), measure=False, activations="int8", **options)
    return replace(named, min_elements=256)


def context_of(out: Path, source: Path) -> Context:
    return Context(out, source, OPTIONS, SILENT)


def kinds(out: Path) -> dict[str, str]:
    """Matrix, without its layer and ``weight`` -> how what it reads is rounded."""
    listed = json.loads((out / "mixt_manifest.json").read_text())["quantisation"]["matrices"]
    return {name.split(".", 3)[-1]: each.get("activations", "") for name, each in listed.items()}


@pytest.mark.parametrize("low", [-3.0, 0.5])
def test_the_operator_is_that_of_the_oracle(low: float) -> None:
    """One scale for a call, 0 among the codes, also where all numbers are positive; a scale for each column."""
    rng = np.random.default_rng(1)
    x = rng.uniform(low, 5, (2, 3, 40)).astype(np.float32)
    codes, scales = rng.integers(-128, 128, (40, 24)).astype(np.int8), rng.uniform(0.001, 0.01, 24).astype(np.float32)
    found = oracle.dynamic_product(x, codes, scales)
    expected = oracle.rounded_call(x) @ (codes.astype(np.float64) * scales)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    exact = x.astype(np.float64) @ (codes.astype(np.float64) * scales)
    assert np.abs(exact - expected).max() > 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("sizes", [[6], [3, 1, 1, 1]])
@pytest.mark.parametrize("tokens", [False, True])
def test_pytorch_rounds_as_the_oracle(sizes: list[int], tokens: bool) -> None:
    """Each call by itself, channels divided by their factors, tokens by their largest magnitude."""
    import torch

    from mixt_export.verification.int8_activations import rounded_apart
    from mixt_export.verification.quantised import Matrix

    rng = np.random.default_rng(2)
    x, factors = rng.standard_normal((1, 6, 20)).astype(np.float32), rng.uniform(0.2, 5, 20).astype(np.float32)
    x[0, 4] = 0
    empty = onnx.TensorProto()
    matrix = Matrix(
        "m", 8, 20, False, 8, 20, ("m",), False, 0.0, 0.0, Path(), empty, empty, "token" if tokens else "call", factors
    )
    found = rounded_apart(torch.from_numpy(x.astype(np.float64)), matrix, sizes).numpy()
    smooth = x.astype(np.float64) / factors
    largest = np.maximum(np.abs(smooth).max(axis=-1, keepdims=True), 1e-30) if tokens else 1.0
    parts = np.split(smooth / largest, np.cumsum(sizes)[:-1], axis=1)
    expected = np.concatenate([oracle.rounded_call(part) for part in parts], axis=1) * largest * factors
    np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize(
    ("family", "low_rank"),
    [(name, False) for name in ("llama", "qwen2", "qwen3", "phi3", "gemma2", "gptj", "gpt2")]
    + [(name, True) for name in ("llama", "qwen2", "gemma2")],
)
def test_smoothing_changes_nothing(tmp_path: Path, text: Path, family: str, low_rank: bool) -> None:
    """Before anything is rounded: biases, norms with an offset and a shift, packed matrices, grouped heads, factors."""
    source = write_tiny(tmp_path / "base", family, num_hidden_layers=2)
    if low_rank:
        source = write_tiny_low_rank(tmp_path / "model", source, 17)
    plan = plan_export(source, quantisation=settings(text))
    floats = plan_export(source, variants="none")
    assert plan.quantised is not None
    smoothing = plan.quantised.smoothing
    assert smoothing is not None
    plain, window = FloatGraph(floats), np.arange(40, dtype=np.int64) * 7 % 256
    calibrate_smoothing(plain, smoothing, source, (text,), SILENT)
    spread = [values.max() / values.min() for values in smoothing.found.values()]
    assert min(spread) > 1.5
    smooth = FloatGraph(floats, smoothing)
    assert all(not np.array_equal(plain.read(name), smooth.read(name)) for name in smoothing.names)
    ((expected,), (found,)) = ([*logits_of(graph.model, graph.read, [window])] for graph in (plain, smooth))
    assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)


def test_an_export_is_proven(tmp_path: Path, text: Path, model: Path) -> None:
    """Every linear; q, k and v lie side by side in the file, and are one product."""
    source = tmp_path / "model"
    source.mkdir()
    write_checkpoint(source, open_checkpoint(model), [], {}, {})
    result = export(source, tmp_path / "out", quantisation=settings(text), verify=False)
    found = {name.split(".")[1]: kind for name, kind in kinds(tmp_path / "out").items() if "proj" in name}
    assert found == {"qkv_proj": "call", "o_proj": "call", "gate_proj": "call", "up_proj": "call", "down_proj": "token"}
    assert FILE in result.manifest["files"]
    report = verify(tmp_path / "out", source, options=OPTIONS)
    assert report.passed
    (check,) = [check for check in report.checks if check.name == "int8_activations"]
    assert check.metrics["products_rel_l2"] < 1e-6


@pytest.mark.parametrize("family", ["qwen2", "phi3", "gemma2", "gptj", "gpt2", "olmo2", "qwen3_moe"])
def test_families(tmp_path: Path, text: Path, family: str) -> None:
    """What does not fit stays in blocks: behind a packed gate, without a gate, behind the residual stream."""
    source = write_tiny(tmp_path / "model", family)
    export(source, tmp_path / "out", quantisation=settings(text), verify=False)
    context = context_of(tmp_path / "out", source)
    for check in (quantised_weights, teacher_forced, far, int8_activations):
        result = check.run(context)
        assert result.passed, result
    last = {"phi3": "mlp.down_proj", "gptj": "mlp.fc_out", "gpt2": "mlp.c_proj", "olmo2": "self_attn.q_proj"}
    stays = [kind for name, kind in kinds(tmp_path / "out").items() if last.get(family, "none") in name]
    assert set(stays) <= {""}
    assert bool(stays) == (family in last)


RANKS = {"q_proj": 17, "k_proj": 16, "v_proj": 19, "o_proj": 21, "gate_proj": 23, "up_proj": 16, "down_proj": 25}


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_low_rank(tmp_path: Path, text: Path, family: str) -> None:
    """Both factors of every linear, odd ranks and biases; what the second reads is rounded as what the first does."""
    base = write_tiny(tmp_path / "base", family, num_hidden_layers=2)
    source = write_tiny_low_rank(tmp_path / "model", base, RANKS)
    export(source, tmp_path / "out", quantisation=settings(text), verify=False)
    found = {name: kind for name, kind in kinds(tmp_path / "out").items() if "core" in name}
    assert len(found) == 2 * len(RANKS)
    assert all(kind == ("token" if "down_proj" in name else "call") for name, kind in found.items())
    context = context_of(tmp_path / "out", source)
    for check in (quantised_weights, teacher_forced, far, int8_activations):
        result = check.run(context)
        assert result.passed, result


def test_a_second_factor_rounded_otherwise_is_found(tmp_path: Path, text: Path, model: Path) -> None:
    """Codes of one scale for all tokens where each was to have its own: only rounding shows it."""
    source = write_tiny_low_rank(tmp_path / "model", model, RANKS)
    out = tmp_path / "out"
    export(source, out, quantisation=settings(text), verify=False)
    proto = onnx.load_model(str(out / "model.onnx"), load_external_data=False)
    proto.graph.initializer.append(numpy_helper.from_array(np.array([0, 1, 2]), "/constants/all_axes"))
    behind = [node for node in proto.graph.node if node.op_type == "ReduceMax" and "down_proj/up" in node.name]
    assert len(behind) == 2
    for node in behind:
        node.input[1] = "/constants/all_axes"
    onnx.save_model(proto, str(out / "model.onnx"))
    context = context_of(out, source)
    assert teacher_forced.run(context).passed
    assert not int8_activations.run(context).passed


def test_other_factorised_linears_stay_in_blocks(tmp_path: Path, text: Path, model: Path) -> None:
    """A mixture as v_proj leaves o_proj in blocks, and what else reads its norm."""
    source = write_tiny_mixt(tmp_path / "model", model, include=lambda name: "v_proj" in name)
    export(source, tmp_path / "out", quantisation=settings(text), verify=False)
    found = kinds(tmp_path / "out")
    assert all(kind == "" for name, kind in found.items() if "self_attn" in name)
    assert {kind for name, kind in found.items() if "mlp" in name} == {"call", "token"}
    context = context_of(tmp_path / "out", source)
    for check in (quantised_weights, teacher_forced, int8_activations):
        result = check.run(context)
        assert result.passed, result


def test_calibrated_rounding_and_an_int8_cache_go_with_it(tmp_path: Path, text: Path, model: Path) -> None:
    """Both are measured on the smoothed graph: its values in the cache are divided by factors."""
    cache = Int8Cache((text,), measure=False)
    asked = settings(text, rounding="calibrated")
    export(model, tmp_path / "out", quantisation=asked, int8_cache=cache, verify=False)
    context = context_of(tmp_path / "out", model)
    for check in (quantised_weights, teacher_forced, far, int8_activations, int8_cache):
        result = check.run(context)
        assert result.passed, result


def _tensor(out: Path, name: str, change: Callable[[NDArray[Any]], NDArray[Any]]) -> None:
    """Change an initializer in the file of weights."""
    proto = onnx.load_model(str(out / "model.onnx"), load_external_data=False)
    tensor = next(each for each in proto.graph.initializer if each.name == name)
    place = {entry.key: entry.value for entry in tensor.external_data}
    begin, end = int(place["offset"]), int(place["offset"]) + int(place["length"])
    data = bytearray((out / "model.onnx.data").read_bytes())
    kind = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    data[begin:end] = change(np.frombuffer(bytes(data[begin:end]), kind).reshape(tensor.dims)).astype(kind).tobytes()
    (out / "model.onnx.data").write_bytes(data)


def _one_up(values: NDArray[Any]) -> NDArray[Any]:
    found = values.copy()
    found.reshape(-1)[7] *= 1.02
    return found


def _norm(out: Path) -> None:
    _tensor(out, "model.layers.1.post_attention_layernorm.weight", _one_up)


def _rows(out: Path) -> None:
    _tensor(out, "model.layers.1.mlp.up_proj.weight.scales", _one_up)


def _factors(out: Path) -> None:
    values = load_file(out / FILE)
    save_file({name: _one_up(each) if "down_proj" in name else each for name, each in values.items()}, out / FILE)


@pytest.mark.parametrize(
    ("fault", "check"),
    [(_norm, teacher_forced), (_rows, quantised_weights), (_factors, quantised_weights)],
)
def test_wrong_factors_are_found(
    tmp_path: Path, exported: Path, model: Path, fault: Callable[[Path], None], check: Any
) -> None:
    out = tmp_path / "out"
    shutil.copytree(exported, out)
    assert check.run(context_of(out, model)).passed
    fault(out)
    result = check.run(context_of(out, model))
    assert not result.passed
    assert "layers" in result.where or check is teacher_forced


def test_wrong_factors_of_cached_values_are_found(tmp_path: Path, exported: Path, model: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(exported, out)
    values = load_file(out / FILE)
    save_file({name: _one_up(each) if name.startswith("past") else each for name, each in values.items()}, out / FILE)
    assert not far.run(context_of(out, model)).passed


@pytest.mark.parametrize("side", ["up_proj.weight.inputs", "v_proj.weight.outputs"])
def test_factors_of_another_length_are_refused(tmp_path: Path, exported: Path, model: Path, side: str) -> None:
    """numpy would repeat a single one."""
    out = tmp_path / "out"
    shutil.copytree(exported, out)
    values = load_file(out / FILE)
    (name,) = (name for name in values if name.endswith(side) and "layers.1" in name)
    save_file(values | {name: values[name][:1]}, out / FILE)
    with pytest.raises(UsageError, match=r"smoothing\.safetensors has factors of shape \(1,\) for .*export again"):
        context_of(out, model)


def test_a_scale_for_all_tokens_instead_of_each_is_found(tmp_path: Path, exported: Path, model: Path) -> None:
    """Without rounding both compute the same."""
    out = tmp_path / "out"
    shutil.copytree(exported, out)
    proto = onnx.load_model(str(out / "model.onnx"), load_external_data=False)
    proto.graph.initializer.append(numpy_helper.from_array(np.array([0, 1, 2]), "/constants/all_axes"))
    for node in proto.graph.node:
        if node.op_type == "ReduceMax":
            node.input[1] = "/constants/all_axes"
    onnx.save_model(proto, str(out / "model.onnx"))
    context = context_of(out, model)
    assert teacher_forced.run(context).passed
    assert not int8_activations.run(context).passed


def test_factors_are_finite_and_even() -> None:
    """Of channels that never move, and of a value that never does."""
    largest = np.array([0.0, 1.0, 100.0], np.float32)
    found = factors_of(largest, np.ones(3, np.float32), 0.5)
    assert np.isfinite(found).all()
    assert np.isclose(np.log(found).mean(), 0, atol=1e-6)
    assert found[0] < found[1] < found[2]
    assert np.array_equal(factors_of(np.zeros(3), np.ones(3), 0.5), np.ones(3))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--activations", "int8"], "--activations is an option of --quantize"),
        (["--quantize", "int4", "--activations", "int8"], "--activations int8 goes with --quantize int8"),
        (["--quantize", "int8", "--activations", "int4"], "--activations int4: not a kind"),
        (["--quantize", "int8", "--activations", "int8", "--target", "onnx"], "--activations int8: only ONNX Runtime"),
        (["--quantize", "int8", "--activations", "int8", "--fp16"], "--activations int8: only ONNX Runtime"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    tmp_path: Path, model: Path, options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_verb("export", model, "-o", tmp_path / "out", "--no-verify", *options) != 0
    assert says in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_a_model_of_which_nothing_fits_is_refused(tmp_path: Path, text: Path, model: Path) -> None:
    source = write_tiny_mixt(tmp_path / "model", model)
    with pytest.raises(UnsupportedError, match="--activations int8: no linear of this model"):
        export(source, tmp_path / "out", quantisation=settings(text), verify=False)
    (model / "tokenizer.json").rename(model / "away")
    try:
        with pytest.raises(UsageError, match=r"has no tokenizer\.json"):
            export(model, tmp_path / "out", quantisation=settings(text), verify=False)
    finally:
        (model / "away").rename(model / "tokenizer.json")


def test_the_note_counts_products(tmp_path: Path, text: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_tiny_mixt(tmp_path / "model", model, include=lambda name: "v_proj" in name)
    options = ["--quantize", "int8", "--activations", "int8", "--calib", text, "--no-loss", "--no-verify"]
    assert run_verb("export", source, "-o", tmp_path / "out", *options) == 0
    assert "with int8 activations in 6 of" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("tensor", "part"),
    [
        ("model.layers.1.post_attention_layernorm.weight", "post_attention_layernorm"),
        ("model.layers.1.mlp.up_proj.weight.scales", "mlp.up_proj"),
        ("model.layers.1.self_attn.v_proj.weight.scales", "self_attn.v_proj"),
    ],
)
def test_a_fault_is_named_though_values_are_scaled(
    tmp_path: Path, exported: Path, model: Path, tensor: str, part: str
) -> None:
    """Integers say what PyTorch computes with, so these scales are changed for the graph alone."""
    out = tmp_path / "out"
    shutil.copytree(exported, out)
    context = context_of(out, model)
    _tensor(out, tensor, _one_up)
    found = locate(context, Pieces(context.probe, [len(context.probe)]))
    assert (found.where, found.part) == ("model.layers.1", part)
