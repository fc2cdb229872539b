"""Weights of few bits in TensorRT graphs: one scale a row or whole blocks, positive, exact in the graph's dtype."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from mixt_export.checkpoints import open_checkpoint
from mixt_export.errors import UnsupportedError
from mixt_export.progress import SILENT
from mixt_export.quantisation import Quantisation, nearest
from mixt_export.quantisation.blocks import dequantised
from mixt_export.quantisation.calibrated import calibrated
from mixt_export.quantisation.layouts import LAYOUTS, layout_of
from mixt_export.targets import export, plan_export
from mixt_export.targets.calibrate import FloatGraph
from mixt_export.targets.rounded import as_floats
from mixt_export.targets.trt import TrtOptions
from mixt_export.verification.checks import quantised_weights, redensified, teacher_forced
from mixt_export.verification.context import Context
from mixt_export.verification.graph import open_graph, read_constant
from mixt_export.verification.options import VerifyOptions
from mixt_export.verification.quantised import integers_of
from tests.tiny import write_tiny, write_tiny_low_rank


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("dense") / "model", num_hidden_layers=2)


@pytest.fixture(scope="module")
def low_rank(tmp_path_factory: pytest.TempPathFactory, dense: Path) -> Path:
    """Rank 17 is no whole number of blocks, 32 is two."""
    folder = tmp_path_factory.mktemp("low-rank") / "model"
    return write_tiny_low_rank(folder, dense, {"q_proj": 17, "down_proj": 32, "up_proj": 32})


def settings(bits: int, **given: Any) -> Quantisation:
    return Quantisation(bits, 16 if bits == 4 else None, None, "nearest", measure=False, min_elements=256, **given)


def exported(source: Path, out: Path, bits: int, jetpack: int, dtype: str = "fp16", **given: Any) -> dict[str, Any]:
    options = TrtOptions(jetpack=jetpack, max_input_len=16)
    result = export(
        source, out, target="trt", dtype=dtype, trt=options, max_seq_len=64, quantisation=settings(bits, **given),
        verify=False,
    )  # fmt: skip
    entry: dict[str, Any] = result.manifest["quantisation"]
    return entry


def context_of(out: Path, source: Path) -> Context:
    return Context(out, source, VerifyOptions(positions=32, memory=False, write=False, threads=1), SILENT)


CASES = [(8, 6, "fp16"), (8, 7, "bf16"), (4, 7, "fp16"), (4, 7, "fp32")]


@pytest.mark.parametrize(("bits", "jetpack", "dtype"), CASES)
@pytest.mark.parametrize("model", ["dense", "low_rank"])
def test_logits_are_those_of_pytorch_with_the_integers(
    request: pytest.FixtureRequest, tmp_path: Path, model: str, bits: int, jetpack: int, dtype: str
) -> None:
    source = request.getfixturevalue(model)
    entry = exported(source, tmp_path / "out", bits, jetpack, dtype)
    assert len(entry["matrices"]) >= 10
    context = context_of(tmp_path / "out", source)
    for check in (quantised_weights, teacher_forced, redensified):
        result = check.run(context)
        assert result.passed, result


@pytest.mark.parametrize(("bits", "jetpack"), [(8, 6), (4, 7)])
def test_what_is_written(low_rank: Path, tmp_path: Path, bits: int, jetpack: int) -> None:
    """Blocks are whole or there are none; scales are positive float16; embedding, head and lookups stay as they are."""
    entry = exported(low_rank, tmp_path / "out", bits, jetpack)
    graph = open_graph(tmp_path / "out")
    proto = graph.proto
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    nodes = {node.input[0]: node for node in proto.graph.node if node.op_type == "DequantizeLinear"}
    assert nodes.keys() == {each["codes"] for each in entry["matrices"].values()}
    for each in entry["matrices"].values():
        rows, columns = each["shape"]
        node, scales = nodes[each["codes"]], tensors[each["scales"]]
        attributes = {entry.name: entry.i for entry in node.attribute}
        assert scales.data_type == onnx.TensorProto.FLOAT16
        assert (read_constant(tmp_path / "out", scales) > 0).all()
        if each["bits"] == 4:
            assert columns % 16 == 0
            assert attributes == {"axis": 0 if each["transposed"] else 1, "block_size": 16}
        else:
            assert each["group"] == columns
            assert (attributes, list(scales.dims)) == ({"axis": 1 if each["transposed"] else 0}, [rows])
    kinds = {each["bits"] for each in entry["matrices"].values()}
    assert kinds == ({8} if bits == 8 else {4, 8})  # rank 17, second factors and the MLP's last linear
    assert entry["head_bits"] is None
    (lookup,) = [node for node in proto.graph.node if node.name == "/model/embed_tokens/Gather"]
    assert tensors[lookup.input[0]].data_type == onnx.TensorProto.FLOAT16


def test_a_board_is_given_what_the_integers_compute(dense: Path, tmp_path: Path) -> None:
    """Golden tensors are those of PyTorch with the integers' weights, not with the model folder's."""
    exported_folder = tmp_path / "out"
    options = TrtOptions(jetpack=7, max_input_len=16)
    export(
        dense, exported_folder, target="trt", dtype="fp16", trt=options, max_seq_len=64, quantisation=settings(4)
    )  # fmt: skip
    golden = exported_folder / "device" / "golden"
    case = json.loads((golden / "golden.json").read_text())["cases"][0]
    recorded = np.load(golden / f"{case['name']}.logits.npy")
    from mixt_export.verification.torch_model import TorchModel

    tokens = np.asarray(case["tokens"], np.int64)
    rows = slice(case["prompt"] - 1, None)
    np.testing.assert_allclose(
        TorchModel(integers_of(exported_folder, dense)).logits(tokens)[rows], recorded, atol=1e-5
    )
    assert np.abs(TorchModel(open_checkpoint(dense)).logits(tokens)[rows] - recorded).max() > 1e-3


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("bits", [4, 8])
def test_positive_scales_cost_little(bits: int, dtype: str) -> None:
    """Every block loses at most what the better of two signs would have gained."""
    rng = np.random.default_rng(bits)
    matrix = rng.standard_normal((24, 64)).astype(np.float32)
    matrix[3, :16] = 0  # no block has a scale of 0
    inputs = rng.standard_normal((64, 200)) * np.linspace(0.2, 3, 64)[:, None]
    gram = inputs @ inputs.T
    from mixt_export.checkpoints.dtypes import numpy_dtype

    for found, free in (
        (nearest(matrix, bits, 16, scale_dtype=dtype), nearest(matrix, bits, 16)),
        (calibrated(matrix, gram, bits, 16, scale_dtype=dtype), calibrated(matrix, gram, bits, 16)),
    ):
        assert (found.scales > 0).all()
        np.testing.assert_array_equal(found.scales, found.scales.astype(numpy_dtype(dtype)).astype(np.float32))
        error, least = (np.linalg.norm((dequantised(one) - matrix) @ inputs) for one in (found, free))
        assert error < 1.2 * least


def test_what_a_layout_does_not_have_is_refused(dense: Path) -> None:
    def plan(jetpack: int, given: Quantisation) -> Any:
        options = TrtOptions(jetpack=jetpack, max_input_len=16)
        return plan_export(dense, target="trt", dtype="fp16", trt=options, max_seq_len=64, quantisation=given)

    with pytest.raises(UnsupportedError, match=r"--quantize int4: blocks of 4 bits .* JetPack 7"):
        plan(6, settings(4))
    with pytest.raises(UnsupportedError, match="--quantize-head: a TensorRT graph keeps"):
        plan(7, Quantisation(8, None, 8))
    with pytest.raises(UnsupportedError, match="--group 16: int8 weights of a TensorRT graph have one scale"):
        plan(7, Quantisation(8, 16))
    with pytest.raises(UnsupportedError, match="the dialect mystery has no weights of few bits"):
        layout_of("mystery")
    assert plan(7, settings(4)).quantised.settings.group == 16
    assert plan(7, Quantisation(4)).quantised.settings.group == LAYOUTS["trt11"].groups[4] == 64


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gemma2", "qwen3_moe"])
def test_the_graph_that_is_calibrated_has_the_same_matrices(tmp_path: Path, family: str) -> None:
    source = write_tiny(tmp_path / "model", family)
    for jetpack in (6, 7):
        options = TrtOptions(jetpack=jetpack, max_input_len=16)
        plan = plan_export(source, target="trt", dtype="fp16", trt=options, max_seq_len=64, quantisation=settings(8))
        floats = plan_export(source, max_seq_len=64, **as_floats(plan, "auto"))
        assert plan.quantised is not None
        for name, matrix in plan.quantised.matrices.items():
            shape = (matrix.rows, matrix.columns)
            tensor = floats.lowered.model.graph.initializers[name].const_value
            assert tuple(tensor.shape.numpy()) == (shape[::-1] if matrix.transposed else shape)
            assert np.shape(FloatGraph(floats).matrix(matrix)) == shape


def test_calibration_is_that_of_the_portable_graph(dense: Path, tmp_path: Path) -> None:
    """Another rounding than to nearest, and no worse by what the layers put out; in a graph of few positions too."""
    texts = tmp_path / "text.txt"
    texts.write_text("a few words of a text that nobody reads, again and again. " * 400, encoding="utf-8")
    error = {}
    for rounding in ("nearest", "calibrated"):
        given = Quantisation(4, 16, None, rounding, texts=(texts,), measure=False, min_elements=256)
        out = tmp_path / rounding
        options = TrtOptions(jetpack=7, max_input_len=16)
        export(dense, out, target="trt", max_seq_len=64, trt=options, quantisation=given, verify=False)
        context = context_of(out, dense)
        assert context.manifest["quantisation"]["rounding"] == rounding
        assert quantised_weights.run(context).passed
        tokens = np.random.default_rng(0).integers(3, 60, 48)
        from mixt_export.verification.torch_model import TorchModel

        exact = TorchModel(dense).logits(tokens)
        error[rounding] = np.linalg.norm(TorchModel(integers_of(out, dense)).logits(tokens) - exact)
    assert error["calibrated"] < error["nearest"]
