from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mixt_export.errors import UnsupportedError, UsageError
from mixt_export.verification import predict_memory
from mixt_export.verification.graph import open_graph
from mixt_export.verification.memory.measure import memory_report, run_probe
from mixt_export.verification.memory.optimised import optimised_elements
from mixt_export.verification.memory.weights import checkpoint_size, count_weights
from tests.tiny import write_tiny, write_tiny_low_rank


def graph(nodes: list[onnx.NodeProto], inputs: dict[str, list[object]], outputs: list[str], **weights: tuple[int, ...]):
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    tensors = [numpy_helper.from_array(np.zeros(shape, np.float32), name) for name, shape in weights.items()]
    made = helper.make_graph(nodes, "g", infos, [onnx.ValueInfoProto(name=name) for name in outputs], tensors)
    return helper.make_model(
        made, opset_imports=[helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)], ir_version=11
    )


def node(kind: str, inputs: str, outputs: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node(kind, inputs.split(), outputs.split(), name=f"/{kind}/{outputs}", **attributes)


def test_a_low_rank_mlp_by_hand() -> None:
    """(b·s, 10) -> rank 3 -> 40, Relu, -> 10: the peak is where the rank-40 product and its factor's input live."""
    proto = graph(
        [
            node("MatMul", "x a", "h"),
            node("MatMul", "h b", "u"),
            node("Relu", "u", "r"),
            node("MatMul", "r c", "y"),
            node("Add", "x y", "z"),
        ],
        {"x": ["batch", "seq", 10]},
        ["z"],
        a=(10, 3),
        b=(3, 40),
        c=(40, 10),
    )
    found = predict_memory(proto, batch=2, seq=7, total=7)
    tokens = 14 * 4
    assert found.weights == 4 * (30 + 120 + 400)
    # at the third MatMul: x (10), r in u's buffer (40), y (10); at the second: x, h, u = 10 + 3 + 40
    assert found.activations == tokens * (10 + 40 + 10)
    assert found.peak_node == "/MatMul/y"
    assert (found.kv_bytes_per_token, found.kv_cache, found.workspace) == (0, 0, 0)


def test_views_are_free_constants_are_not_activations_and_in_place_needs_a_dying_input() -> None:
    inputs: dict[str, list[object]] = {"x": ["batch", 8]}
    nodes = [node("Unsqueeze", "x axis", "v"), node("Sigmoid", "v", "y"), node("Relu", "x", "z")]
    view = graph(nodes, inputs, ["y", "z"])
    view.graph.initializer.append(numpy_helper.from_array(np.array([0]), "axis"))
    assert predict_memory(view, batch=5).activations == 2 * 5 * 8 * 4  # y cannot overwrite v, a view of x
    chain = graph([node("Sigmoid", "x", "a"), node("Relu", "a", "b"), node("Tanh", "b", "y")], inputs, ["y"])
    assert predict_memory(chain, batch=5).activations == 5 * 8 * 4  # all in place
    kept = graph([node("Sigmoid", "x", "a"), node("Relu", "a", "b"), node("Mul", "a b", "y")], inputs, ["y"])
    assert predict_memory(kept, batch=5).activations == 2 * 5 * 8 * 4  # Relu may not overwrite a
    folded = graph([node("Transpose", "w", "t"), node("MatMul", "x t", "y")], inputs, ["y"], w=(6, 8))
    assert predict_memory(folded, batch=5).activations == 5 * 4 * (8 + 6)


def test_cache_and_attention_scores_are_counted_apart() -> None:
    cache: list[object] = ["batch", 2, "past", 4]
    proto = graph(
        [
            node(
                "GroupQueryAttention", "q k v past_key_values.0.key past_key_values.0.value n m",
                "o present.0.key present.0.value", domain="com.microsoft", num_heads=6, kv_num_heads=2,
            )
        ],
        {
            "q": ["batch", "seq", 24], "k": ["batch", "seq", 8], "v": ["batch", "seq", 8],
            "past_key_values.0.key": cache, "past_key_values.0.value": cache, "n": ["batch", 1], "m": [],
        },
        ["o", "present.0.key", "present.0.value"],
    )  # fmt: skip
    found = predict_memory(proto, batch=3, seq=5, total=20)
    assert found.kv_bytes_per_token == 2 * 2 * 4 * 4
    assert found.kv_cache == 3 * 20 * 64
    assert found.workspace == 3 * 6 * 5 * 20 * 4
    assert found.activations == 4 * (3 * 5 * (24 + 8 + 8 + 24) + 3 + 1)
    assert found.sum == found.weights + found.kv_cache + found.activations + found.workspace


def test_model_local_functions_are_looked_into() -> None:
    proto = graph([node("Pair", "x a b", "y", domain="test")], {"x": ["batch", 16]}, ["y"], a=(16, 5), b=(5, 16))
    proto.opset_import.append(helper.make_opsetid("test", 1))
    body = [helper.make_node("MatMul", ["i", "p"], ["h"]), helper.make_node("MatMul", ["h", "q"], ["o"])]
    proto.functions.append(
        helper.make_function("test", "Pair", ["i", "p", "q"], ["o"], body, [helper.make_opsetid("", 20)])
    )
    assert predict_memory(proto, batch=9).activations == 9 * 4 * (5 + 16)  # x is gone when the second product is made


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"seq": 0}, {"seq": 5, "total": 4}])
def test_impossible_sizes(sizes: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="memory prediction"):
        predict_memory(graph([node("Relu", "x", "y")], {"x": ["batch"]}, ["y"]), **sizes)


def test_what_cannot_be_inferred_is_named() -> None:
    unknown = graph([node("Mystery", "x", "y", domain="com.microsoft")], {"x": ["batch"]}, ["y"])
    with pytest.raises(UnsupportedError, match=r"com\.microsoft::Mystery"):
        predict_memory(unknown)
    with pytest.raises(UnsupportedError, match="'tokens'"):
        predict_memory(graph([node("Relu", "x", "y")], {"x": ["tokens"]}, ["y"]))
    with pytest.raises(UnsupportedError, match="contradicts the graph around it"):
        predict_memory(graph([node("Relu", "absent", "y")], {"x": ["batch"]}, ["y"]))


def test_a_whole_decoder(exported: Path) -> None:
    """Weights by the files; activations grow with the tokens, the cache with the positions."""
    one, many = (predict_memory(exported, batch=1, seq=seq, total=64) for seq in (1, 64))
    assert one.weights == many.weights
    on_disk = (exported / "weights.bin").stat().st_size + (exported / "model.onnx").stat().st_size
    assert 0.7 * on_disk < one.weights < on_disk
    assert one.kv_cache == 64 * one.kv_bytes_per_token == 64 * open_graph(exported).kv_bytes_per_token
    assert 20 < many.activations / one.activations < 80
    assert many.workspace == 64 * one.workspace == 4 * 4 * 64 * 64


def test_shared_bytes_count_once(tmp_path: Path) -> None:
    proto = graph([node("MatMul", "x a", "y")], {"x": ["batch", 4]}, ["y"], a=(4, 4), b=(4, 4))
    onnx.save_model(proto, tmp_path / "m.onnx", save_as_external_data=True, location="w", size_threshold=0)
    loaded = onnx.load_model(tmp_path / "m.onnx", load_external_data=False)
    assert count_weights(loaded).elements == 32
    first, second = loaded.graph.initializer
    del second.external_data[:]
    second.external_data.extend(first.external_data)
    assert count_weights(loaded).elements == 16
    assert count_weights(loaded).nbytes == 64


def test_checkpoint_size_counts_factors_and_what_they_stand_for(tmp_path: Path) -> None:
    base = write_tiny(tmp_path / "base", "llama", hidden_size=48, intermediate_size=104)
    whole = checkpoint_size(base, 3)
    assert whole.elements == whole.dense_elements
    factored = checkpoint_size(write_tiny_low_rank(tmp_path / "lr", base, {"up_proj": 5}), 3)
    assert factored.dense_elements == whole.elements
    assert whole.elements - factored.elements == 3 * (48 * 104 - 5 * (48 + 104))
    assert checkpoint_size(base, 1).elements < checkpoint_size(base, 2).elements < whole.elements


def test_an_optimiser_that_multiplies_factors_is_seen(exported: Path, tmp_path: Path) -> None:
    """Weight-first order: onnxruntime folds MatMul(a, b) of two constants into the dense matrix."""
    proto = open_graph(exported).proto
    assert optimised_elements(open_graph(exported), 1) <= 1.01 * count_weights(proto).elements
    tail = proto.graph.node[-1]  # logits = Cast(logits of the head); put a constant product before it
    rank = [numpy_helper.from_array(np.zeros(s, np.float32), n) for n, s in (("fa", (300, 2)), ("fb", (2, 300)))]
    proto.graph.initializer.extend(rank)
    head = tail.input[0]
    proto.graph.node.insert(len(proto.graph.node) - 1, node("MatMul", "fa fb", "dense"))
    proto.graph.node.insert(len(proto.graph.node) - 1, node("MatMul", f"{head} dense", "mixed"))
    proto.graph.node[-1].input[0] = "mixed"
    folder = tmp_path / "dense"
    folder.mkdir()
    os.link(exported / "weights.bin", folder / "weights.bin")
    onnx.save_model(proto, folder / "model.onnx")
    grown = optimised_elements(open_graph(folder), 1)
    assert grown > count_weights(proto).elements + 80_000


def test_measured_in_a_fresh_process(exported: Path, model: Path) -> None:
    report = memory_report(open_graph(exported), model, 64, threads=1, measured=True)
    assert set(report.measured) == {"exported", "torch"}
    assert not report.notes
    found = report.measured["exported"]
    # A tiny model: the runtime's own fixed cost of some MB is on top of what the model needs.
    assert 0 < found.loaded <= found.ran < found.peak
    assert report.prefill.sum < found.ran < report.prefill.sum + 64e6
    assert report.kv_at_max == 64 * report.decode.kv_bytes_per_token


def test_a_measurement_that_fails_is_a_note(tmp_path: Path) -> None:
    arguments = {"kind": "exported", "folder": str(tmp_path), "dtype": "float32", "prompt": 4, "decode": 1}
    reason = run_probe({**arguments, "threads": 1, "layers": 1})
    assert isinstance(reason, str)
    assert "holds no model.onnx" in reason


def test_prediction_needs_neither_torch_nor_onnxruntime() -> None:
    code = (
        "import sys; from mixt_export.verification import predict_memory; "
        "sys.exit(bool({'torch', 'transformers', 'onnxruntime'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
