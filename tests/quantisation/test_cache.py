"""A cache of 8 bits: what is kept and attended to, against a float64 oracle; scales; faults; the runner."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from mixt_export.errors import MixtError, UnsupportedError, UsageError
from mixt_export.families.parts import Rope
from mixt_export.families.rope import turned_together
from mixt_export.progress import SILENT
from mixt_export.quantisation import Quantisation
from mixt_export.quantisation.cache import CacheScales, Int8Cache, measure_cache
from mixt_export.runtime import load_runtime
from mixt_export.targets import export, plan_export
from mixt_export.targets.calibrate import FloatGraph
from mixt_export.targets.trt import TrtOptions
from mixt_export.verification import verify
from mixt_export.verification.checks import int8_activations, int8_cache
from mixt_export.verification.context import Context
from mixt_export.verification.graph import open_graph, read_constant
from mixt_export.verification.int8_cache import cache_scales, float_cache
from mixt_export.verification.options import VerifyOptions
from mixt_export.verification.session import ExportedRunner
from tests.tiny import write_tiny
from tests.tiny_encoder import write_tiny_encoder
from tests.verbs import run_verb

OPTIONS = VerifyOptions(positions=32, memory=False, write=False, threads=1)
FAMILIES = ["llama", "qwen2", "phi3", "gemma2", "gptj", "gpt2", "qwen3_moe"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, model: Path, text: Path) -> Path:
    out = tmp_path_factory.mktemp("exported") / "out"
    export(model, out, int8_cache=Int8Cache((text,), measure=False), verify=False)
    return out


def context_of(out: Path, source: Path) -> Context:
    return Context(out, source, OPTIONS, SILENT)


def kept(values: NDArray[np.float64], scale: NDArray[np.float64]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = np.clip(np.rint(values / scale), -128, 127) * scale
    return found


@pytest.mark.parametrize(("first", "second"), [(5, 0), (1, 6), (7, 1)])
def test_the_kernel_attends_to_what_it_keeps(first: int, second: int) -> None:
    """GroupQueryAttention of ONNX Runtime's CPU beside an oracle: codes, and softmax over rounded keys and values."""
    heads, groups, width, rng = 4, 2, 16, np.random.default_rng(first)
    scales = rng.uniform(0.01, 0.03, (2, 1, groups, 1, width)).astype(np.float32)
    session = _attention(heads, groups, width, scales)
    total = first + second
    q, k, v = (rng.standard_normal((1, total, count * width)).astype(np.float32) for count in (heads, groups, groups))
    cache = [np.zeros((1, groups, 0, width), np.int8)] * 2
    rows = []
    for begin, end in ((0, first), (first, total))[: 1 + bool(second)]:
        feeds = {"q": q[:, begin:end], "k": k[:, begin:end], "v": v[:, begin:end], "pk": cache[0], "pv": cache[1]}
        out, *cache = session.run(
            None, {**feeds, "last": np.array([end - 1], np.int32), "total": np.array(end, np.int32)}
        )
        rows.append(out[0])

    def split(x: NDArray[Any], count: int) -> NDArray[np.float64]:
        return x[0].reshape(total, count, width).swapaxes(0, 1).astype(np.float64)

    keys, values = split(k, groups), split(v, groups)
    rounded = [kept(part, scale[0].astype(np.float64)) for part, scale in zip((keys, values), scales, strict=True)]
    for codes, part, scale in zip(cache, rounded, scales, strict=True):
        np.testing.assert_array_equal(codes[0], np.rint(part / scale[0]))
        assert codes.min() == -128 or codes.max() == 127  # some lie beyond the range
    expected = np.zeros((total, heads, width))
    for head in range(heads):
        of = head // (heads // groups)
        scores = split(q, heads)[head] @ rounded[0][of].T / np.sqrt(width)
        scores[np.triu_indices(total, 1)] = -np.inf
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        expected[:, head] = weights / weights.sum(axis=-1, keepdims=True) @ rounded[1][of]
    np.testing.assert_allclose(np.concatenate(rows), expected.reshape(total, -1), atol=2e-6)


def _attention(heads: int, groups: int, width: int, scales: NDArray[np.float32]) -> Any:
    def value(name: str, kind: int, *shape: Any) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, list(shape))

    floats = [
        value(name, TensorProto.FLOAT, 1, "s", n * width) for name, n in (("q", heads), ("k", groups), ("v", groups))
    ]
    past = [value(name, TensorProto.INT8, 1, groups, "p", width) for name in ("pk", "pv")]
    counts = [value("last", TensorProto.INT32, 1), value("total", TensorProto.INT32)]
    node = helper.make_node(
        "GroupQueryAttention",
        ["q", "k", "v", "pk", "pv", "last", "total", "", "", "", "", "", "ks", "vs"],
        ["y", "nk", "nv"],
        domain="com.microsoft", num_heads=heads, kv_num_heads=groups, kv_cache_bit_width=8,
        k_quant_type="PER_CHANNEL", v_quant_type="PER_CHANNEL",
    )  # fmt: skip
    present = [value(name, TensorProto.INT8, 1, groups, "t", width) for name in ("nk", "nv")]
    constants = [numpy_helper.from_array(scale, name) for name, scale in zip(("ks", "vs"), scales, strict=True)]
    graph = helper.make_graph(
        [node], "g", [*floats, *past, *counts], [value("y", TensorProto.FLOAT), *present], constants
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_proven(tmp_path: Path, text: Path, family: str) -> None:
    source = write_tiny(tmp_path / "model", family)
    result = export(source, tmp_path / "out", int8_cache=Int8Cache((text,), measure=False), verify=False)
    assert result.manifest["kv"]["dtype"] == "int8"
    assert result.manifest["dtype"] == "float32"
    report = verify(tmp_path / "out", source, options=OPTIONS)
    failed = [(check.name, check.reason) for check in report.checks if not check.passed]
    assert not failed
    (found,) = [check.metrics for check in report.checks if check.name == "int8_cache"]
    assert found["rel_l2"] < 1e-5 < 0.01 * found["rounding_costs"] + 1e-5


def test_with_quantised_weights_each_rounding_is_judged_apart(tmp_path: Path, model: Path, text: Path) -> None:
    settings = Quantisation(4, 16, None, "nearest", measure=False, min_elements=256)
    cache = Int8Cache((text,), measure=False)
    export(model, tmp_path / "out", int8_cache=cache, quantisation=settings, verify=False)
    context = context_of(tmp_path / "out", model)
    for check in (int8_activations, int8_cache):
        result = check.run(context)
        assert result.passed, result
        assert result.metrics["rel_l2"] < 0.1 * result.metrics["rounding_costs"]


def test_scales_are_the_largest_of_calibration(model: Path) -> None:
    """Of values channel by channel, of keys the length of a pair, which later positions turn within."""
    graph = FloatGraph(plan_export(model, max_seq_len=64))
    windows = [np.random.default_rng(seed).integers(3, 90, 21) for seed in (0, 1)]
    scales = CacheScales()
    measure_cache(graph.model, graph.read, windows, graph.turned, scales, threads=1)
    from mixt_export.verification.torch_model import TorchModel

    torch_model = TorchModel(model)
    kept_ones = [torch_model.cache_of(window) for window in windows]
    for layer in range(len(graph.turned)):
        keys = np.concatenate([each[2 * layer] for each in kept_ones], axis=2)[0]
        values = np.concatenate([each[2 * layer + 1] for each in kept_ones], axis=2)[0]
        half = keys.shape[-1] // 2
        length = np.hypot(keys[..., :half], keys[..., half:]).max(axis=1)
        np.testing.assert_allclose(
            scales.of(layer, "key")[0, :, 0], np.concatenate([length, length], axis=-1) / 127, rtol=1e-5
        )
        np.testing.assert_allclose(scales.of(layer, "value")[0, :, 0], np.abs(values).max(axis=1) / 127, rtol=1e-5)
    with pytest.raises(MixtError, match="block 9's keys was not measured"):
        scales.of(9, "key")


def test_pairs_of_both_layouts_and_of_a_part_of_a_head() -> None:
    rope = next(block.attention.rope for block in _decoder("gptj").blocks)
    assert isinstance(rope, Rope)
    assert rope.interleaved
    assert turned_together(rope)[:2] == [(0, 1), (2, 3)]
    assert len(turned_together(rope)) == rope.rotary_dim // 2
    half = next(block.attention.rope for block in _decoder("llama").blocks)
    assert half is not None
    assert turned_together(half)[1] == (1, 1 + half.rotary_dim // 2)


def _decoder(family: str) -> Any:
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        return plan_export(write_tiny(Path(scratch) / "model", family)).decoder


def test_the_runner_keeps_a_quarter_of_the_bytes(model: Path, exported: Path) -> None:
    """Prompts in pieces, steps and a growing cache give what the session gives in one run."""
    runtime: Any = load_runtime("ort")
    loaded = runtime.Model(exported, threads=1)
    plain = plan_export(model)
    assert loaded.manifest.kv_bytes_per_token * 4 == plain.kv_bytes_per_token
    tokens = np.random.default_rng(3).integers(3, 90, 40)
    cache = loaded.new_cache()
    logits = loaded.prefill([tokens[:30].tolist()], cache, chunk=7)[0]
    for token in tokens[30:]:
        logits = loaded.step([int(token)], cache)[0]
    whole = ExportedRunner(open_graph(exported), threads=1).full(tokens).logits[0, -1]
    np.testing.assert_allclose(logits, whole, atol=1e-4 * np.abs(whole).max())
    assert cache.nbytes * 4 == cache.capacity * plain.kv_bytes_per_token


def _smaller(proto: onnx.ModelProto, folder: Path) -> None:
    _scaled(proto, folder, "/attention/1/key_scale", 0.3)


def _larger(proto: onnx.ModelProto, folder: Path) -> None:
    _scaled(proto, folder, "/attention/1/value_scale", 60.0)


def _scaled(proto: onnx.ModelProto, folder: Path, name: str, factor: float) -> None:
    tensor = next(tensor for tensor in proto.graph.initializer if tensor.name == name)
    value = (read_constant(folder, tensor) * factor).reshape(tuple(tensor.dims)).astype(np.float32)
    tensor.CopyFrom(numpy_helper.from_array(value, name))


@pytest.mark.parametrize(("fault", "what"), [(_smaller, "beyond the range"), (_larger, "lost by rounding them")])
def test_scales_that_do_not_fit_are_found_and_their_block_named(
    model: Path, exported: Path, tmp_path: Path, fault: Callable[[onnx.ModelProto, Path], None], what: str
) -> None:
    result = int8_cache.run(context_of(_changed(exported, tmp_path / "out", fault), model))
    assert not result.passed
    assert what in result.reason
    assert result.where == "model.layers.1"


def test_a_cache_that_is_read_otherwise_is_found(model: Path, exported: Path) -> None:
    """PyTorch that keeps keys and values as computed is off by all that rounding costs."""
    context = context_of(exported, model)
    context.graph = float_cache(context.graph)
    scales = cache_scales(open_graph(exported))
    from mixt_export.verification.alike import beside
    from mixt_export.verification.int8_cache import rounding_cache

    reason, metrics = beside(context, context.graph, lambda torch_model, _sizes: rounding_cache(torch_model, scales))
    assert "from PyTorch that rounds alike exceeds" in reason
    assert metrics["rel_l2"] > 2 * metrics["bar"]


def test_a_graph_without_scales_is_refused(model: Path, exported: Path, tmp_path: Path) -> None:
    def lost(proto: onnx.ModelProto, _folder: Path) -> None:
        node = [node for node in proto.graph.node if node.op_type == "GroupQueryAttention"][1]
        node.input[13] = "input_ids"

    with pytest.raises(UsageError, match="has an int8 cache and no constant scales"):
        int8_cache.run(context_of(_changed(exported, tmp_path / "out", lost), model))


def _changed(clean: Path, folder: Path, change: Callable[[onnx.ModelProto, Path], None]) -> Path:
    import shutil

    shutil.copytree(clean, folder)
    proto = onnx.load_model(str(folder / "model.onnx"), load_external_data=False)
    change(proto, folder)
    onnx.save_model(proto, str(folder / "model.onnx"))
    return folder


def test_the_command_says_what_it_costs(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = [model, "-o", out, "--kv-cache", "int8", "--calib", text, "--no-verify"]
    assert run_verb("export", *arguments) == 0
    said = " ".join(capsys.readouterr().out.split())
    plan = plan_export(model)
    assert (
        f"int8 cache of keys and values: {plan.kv_bytes_per_token:,} → {plan.kv_bytes_per_token // 4:,} bytes" in said
    )
    assert "quantisation costs: perplexity" in said
    assert json.loads((out / "mixt_manifest.json").read_text())["kv"]["loss"]["kl"] >= 0


def test_what_does_not_go_together_is_refused(model: Path, tmp_path: Path) -> None:
    cache = Int8Cache(measure=False)
    for target, options in (("onnx", {}), ("ort", {"dtype": "fp16"}), ("trt", {"trt": TrtOptions()})):
        with pytest.raises(UnsupportedError, match="--kv-cache int8: only ONNX Runtime's attention on the CPU"):
            export(model, tmp_path / "out", target=target, int8_cache=cache, verify=False, **options)  # type: ignore[arg-type]
    (bare := tmp_path / "bare").mkdir()
    for path in model.iterdir():
        if not path.name.startswith("tokenizer"):
            (bare / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UsageError, match=r"has no tokenizer\.json"):
        export(bare, tmp_path / "out", int8_cache=cache, verify=False)
    with pytest.raises(UnsupportedError, match="an encoder keeps no keys"):
        export(write_tiny_encoder(tmp_path / "encoder"), tmp_path / "out", int8_cache=cache, verify=False)
    assert run_verb("export", model, "-o", tmp_path / "out", "--kv-cache", "int4") == 2
    assert not (tmp_path / "out").exists()
