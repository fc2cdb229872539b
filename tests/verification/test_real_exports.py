"""What the exporter writes, clean and broken, in both dialects, dense and factorised."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest

from mixt_export.targets import export
from mixt_export.verification import VerifyOptions, predict_memory, verify
from mixt_export.verification.graph import open_graph
from tests.tiny import write_tiny, write_tiny_low_rank

FAMILIES = ("llama", "qwen2", "qwen3")


@pytest.fixture(scope="module")
def low_rank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("low_rank")
    return write_tiny_low_rank(root / "model", write_tiny(root / "base", "llama"), {"up_proj": 9, "q_proj": 5})


def exported(model: Path, folder: Path, target: str, dtype: str = "float32") -> Path:
    export(model, folder, target=target, dtype=dtype, verify=False)
    return folder


@pytest.mark.parametrize("target", ["ort", "onnx"])
@pytest.mark.parametrize("family", FAMILIES)
def test_clean_dense_exports_pass(family: str, target: str, tmp_path: Path, quick: VerifyOptions) -> None:
    model = write_tiny(tmp_path / "model", family, tied=family != "qwen3")
    report = verify(exported(model, tmp_path / "out", target), model, options=quick)
    assert report.passed, [check for check in report.checks if not check.passed]
    assert ("shared_cache" in {check.name for check in report.checks}) == (target == "ort")
    assert report.memory is not None
    assert not report.notes


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("target", ["ort", "onnx"])
def test_clean_low_rank_exports_pass(
    target: str, dtype: str, low_rank: Path, tmp_path: Path, quick: VerifyOptions
) -> None:
    folder = exported(low_rank, tmp_path / "out", target, dtype)
    report = verify(folder, low_rank, options=quick)
    assert report.passed, [check for check in report.checks if not check.passed]
    assert report.memory is not None
    assert report.memory.dense_weights > report.memory.prefill.weights - 256 * 16 * 4


def test_the_first_layers_alone_pass(low_rank: Path, tmp_path: Path, quick: VerifyOptions) -> None:
    export(low_rank, tmp_path / "out", target="ort", num_layers=2, verify=False)
    report = verify(tmp_path / "out", low_rank, options=quick)
    assert report.passed, [check for check in report.checks if not check.passed]
    assert len(report.layers) == 2


def swap_factors(proto: onnx.ModelProto) -> None:
    """Layer 1 reads layer 2's up projection."""
    names = {tensor.name for tensor in proto.graph.initializer}
    for node in proto.graph.node:
        for index, name in enumerate(node.input):
            other = name.replace("layers.1.mlp.up_proj", "layers.2.mlp.up_proj")
            if name != other and other in names:
                node.input[index] = other


def change_scale(proto: onnx.ModelProto) -> None:
    for node in proto.graph.node:
        if node.op_type == "GroupQueryAttention" and "layers.2" in node.name:
            next(attribute for attribute in node.attribute if attribute.name == "scale").f *= 1.1


def no_rotary(proto: onnx.ModelProto) -> None:
    for node in proto.graph.node:
        if node.op_type == "GroupQueryAttention" and "layers.1" in node.name:
            next(attribute for attribute in node.attribute if attribute.name == "do_rotary").i = 0
            del node.input[7:]


def short_cache(proto: onnx.ModelProto) -> None:
    """Attention in layer 0 is told of one key fewer, as an off-by-one in the lengths would."""
    node = next(node for node in proto.graph.node if node.op_type == "GroupQueryAttention")
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(1, np.int32), "one_fewer"))
    zero = onnx.numpy_helper.from_array(np.array(0, np.int32), "not_below")
    proto.graph.initializer.append(zero)
    position = list(proto.graph.node).index(node)
    proto.graph.node.insert(position, onnx.helper.make_node("Sub", [node.input[5], "one_fewer"], ["fewer"]))
    proto.graph.node.insert(position + 1, onnx.helper.make_node("Max", ["fewer", "not_below"], ["lengths"]))
    node.input[5] = "lengths"


def width_as_length(proto: onnx.ModelProto) -> None:
    """Attention is told that sequences are as long as the mask."""
    nodes = proto.graph.node
    index = next(index for index, node in enumerate(nodes) if node.op_type == "GroupQueryAttention")
    one = onnx.numpy_helper.from_array(np.array([1], np.int32), "one_fewer")
    proto.graph.initializer.append(one)
    nodes.insert(index, onnx.helper.make_node("Sub", [nodes[index].input[6], "one_fewer"], ["width"]))
    for node in nodes:
        if node.op_type == "GroupQueryAttention":
            node.input[5] = "width"


@pytest.mark.parametrize(
    ("fault", "where"),
    [
        (swap_factors, "model.layers.1"),
        (change_scale, "model.layers.2"),
        (no_rotary, "model.layers.1"),
        (short_cache, "model.layers.0"),
    ],
)
def test_broken_exports_fail(fault, where: str, low_rank: Path, tmp_path: Path, quick: VerifyOptions) -> None:
    report = verify(broken_export(fault, low_rank, tmp_path), low_rank, options=quick)
    assert not report.passed
    assert report.first_diverging_layer == where


def test_a_graph_that_takes_the_mask_for_as_long_as_it_is_fails_in_the_shared_buffer(
    low_rank: Path, tmp_path: Path, quick: VerifyOptions
) -> None:
    """Right for single sequences whose mask is all ones; the runner's steps come with one as long as the buffer."""
    report = verify(broken_export(width_as_length, low_rank, tmp_path), low_rank, options=quick)
    passed = {check.name: check.passed for check in report.checks}
    assert passed["decode"] and not passed["shared_cache"]


def broken_export(fault, low_rank: Path, tmp_path: Path) -> Path:
    clean, broken = exported(low_rank, tmp_path / "out", "ort"), tmp_path / "broken"
    broken.mkdir()
    for path in clean.iterdir():
        if path.is_file() and path.name != "model.onnx":
            os.link(path, broken / path.name)
    proto = onnx.load_model(clean / "model.onnx", load_external_data=False)
    fault(proto)
    onnx.save_model(proto, broken / "model.onnx")
    return broken


@pytest.mark.parametrize("target", ["ort", "onnx"])
def test_memory_of_real_graphs(target: str, low_rank: Path, tmp_path: Path) -> None:
    folder = exported(low_rank, tmp_path / "out", target)
    graph = open_graph(folder)
    found = predict_memory(folder, batch=2, seq=8, total=32)
    assert found.kv_bytes_per_token == graph.kv_bytes_per_token
    assert found.kv_cache == 2 * 32 * graph.kv_bytes_per_token
    width = 104  # at the peak at least gate and up, or gate and the residual stream, are alive
    assert found.activations >= 2 * 8 * 4 * (width + 48)
    assert found.activations < 2 * 8 * 4 * 6 * width


def test_a_short_longest_sequence_is_respected(low_rank: Path, tmp_path: Path) -> None:
    """Rotary tables of 12 rows: every check must stay within them, with and without a tokenizer."""
    export(low_rank, tmp_path / "out", target="ort", max_seq_len=12, verify=False)
    options = VerifyOptions(positions=40, greedy_tokens=30, memory=False, threads=1, write=False)
    report = verify(tmp_path / "out", low_rank, options=options)
    assert report.passed, [check for check in report.checks if not check.passed]
    assert report.memory is not None
    assert report.memory.max_seq_len == 12
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in low_rank.iterdir():
        if not path.name.startswith("tokenizer"):
            os.link(path, bare / path.name)
    (tmp_path / "out" / "tokenizer.json").unlink()
    report = verify(tmp_path / "out", bare, options=options)
    assert report.passed, [check for check in report.checks if not check.passed]
    forced = next(check for check in report.checks if check.name == "teacher_forced")
    assert forced.metrics["tokens"] == "random tokens"
