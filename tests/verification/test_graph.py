from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from mixt_export.errors import CheckpointError, UsageError
from mixt_export.verification.checks.chunked_prefill import splits
from mixt_export.verification.graph import check_external_paths, instrument, open_graph
from mixt_export.verification.session import ExportedRunner
from tests.verification.handmade import write_handmade


def test_facts_of_the_graph(exported: Path) -> None:
    graph = open_graph(exported)
    assert (graph.layers, graph.kv_heads, graph.head_dim) == (3, 2, 16)
    assert (graph.dtype, graph.dialect) == ("float32", "portable")
    assert graph.kv_bytes_per_token == 3 * 2 * 2 * 16 * 4
    assert graph.vocab_size == 300


def test_instrumenting_changes_only_the_last_position(exported: Path) -> None:
    graph = open_graph(exported)
    before = graph.proto.SerializeToString()
    changed = instrument(graph)
    assert graph.proto.SerializeToString() == before
    names = {node.name for node in graph.proto.graph.node} - {node.name for node in changed.graph.node}
    assert names == {"/lm_head/last_position"}
    tokens = np.arange(17) * 11 % 250
    plain = ExportedRunner(graph, 1).full(tokens)
    every = ExportedRunner(graph, 1, all_positions=True, layers=True).full(tokens)
    assert every.logits.shape == (1, 17, 300)
    assert [layer.shape for layer in every.layers] == [(1, 17, 48)] * 3
    np.testing.assert_allclose(every.logits[:, -1:], plain.logits, rtol=1e-5, atol=1e-5)


def test_nothing_is_left_in_the_folder(exported: Path) -> None:
    before = sorted(path.name for path in exported.iterdir())
    ExportedRunner(open_graph(exported), 1, all_positions=True)
    assert sorted(path.name for path in exported.iterdir()) == before


@pytest.mark.parametrize("length", [2, 3, 5, 16, 48])
def test_splits_cover_the_sequence_in_different_ways(length: int) -> None:
    ways = splits(length, seed=3)
    assert all(sum(sizes) == length and min(sizes) >= 1 for sizes in ways)
    assert [length] in ways
    assert len({tuple(sizes) for sizes in ways}) == len(ways)
    if length >= 16:
        assert any(size % 2 for sizes in ways for size in sizes)
        assert len(ways) >= 5


def _broken(folder: Path, exported: Path, change: str) -> Path:
    folder.mkdir()
    (folder / "weights.bin").write_bytes((exported / "weights.bin").read_bytes())
    proto = onnx.load_model(exported / "model.onnx", load_external_data=False)
    if change == "escape":
        for tensor in proto.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = "../exported/weights.bin"
    elif change == "missing":
        (folder / "weights.bin").unlink()
    elif change == "unnamed":
        next(node for node in proto.graph.node if node.name == "/lm_head/last_position").name = "other"
    elif change == "layers":
        for node in proto.graph.node:
            for values in (node.input, node.output):
                for index, name in enumerate(values):
                    values[index] = "elsewhere" if name == "/model/layers.1/output" else name
    elif change == "no cache":
        proto.graph.input[2].name = "cache"
        del proto.graph.input[2:]
    onnx.save_model(proto, folder / "model.onnx")
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("escape", "points outside the folder"),
        ("missing", "which is missing"),
        ("unnamed", "has no node '/lm_head/last_position'"),
        ("layers", "values /model/layers"),
        ("no cache", "lacks input_ids"),
    ],
)
def test_a_foreign_or_damaged_graph_is_one_sentence(change: str, message: str, exported: Path, tmp_path: Path) -> None:
    folder = _broken(tmp_path / "broken", exported, change)
    with pytest.raises(UsageError, match=message):
        instrument(open_graph(folder))


def test_a_folder_without_a_model_and_a_file_of_garbage(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no model\.onnx"):
        open_graph(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"\xff\x00 not a model")
    with pytest.raises(UsageError, match="not a readable ONNX model"):
        open_graph(tmp_path)


def test_greedy_equals_argmax_of_full_passes(model: Path, exported: Path) -> None:
    runner = ExportedRunner(open_graph(exported), 1)
    prompt = np.array([5, 80, 7])
    tokens = prompt
    for _ in range(6):
        tokens = np.append(tokens, runner.full(tokens).logits[0, -1].argmax())
    assert runner.greedy(prompt, 6).tolist() == tokens[3:].tolist()


def test_left_padding_of_the_portable_dialect(model: Path, tmp_path: Path) -> None:
    runner = ExportedRunner(open_graph(write_handmade(tmp_path / "made", model)), 1)
    ids, mask = runner.padded([np.array([1, 2]), np.array([3, 4, 5])])
    assert ids.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert mask.tolist() == [[0, 1, 1], [1, 1, 1]]
    assert runner.grow(mask).tolist() == [[0, 1, 1, 1], [1, 1, 1, 1]]


def test_a_graph_that_is_a_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"x")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.onnx").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="leads out of the model folder"):
        open_graph(folder)


def test_no_tensor_of_an_inner_graph_or_a_function_points_outside() -> None:
    def outside(name: str) -> onnx.TensorProto:
        tensor = onnx.TensorProto(name=name, data_type=onnx.TensorProto.FLOAT, dims=[1])
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="../secret")
        return tensor

    inner = onnx.helper.make_graph([], "inner", [], [], initializer=[outside("a")])
    branch = onnx.helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)
    constant = onnx.helper.make_node("Constant", [], ["z"], value=outside("b"))
    function = onnx.helper.make_function("d", "f", [], ["z"], [constant], [])
    for nodes, functions in (([branch], []), ([constant], []), ([], [function])):
        graph = onnx.helper.make_graph(nodes, "g", [], [])
        with pytest.raises(UsageError, match="points outside the folder"):
            check_external_paths(onnx.helper.make_model(graph, functions=functions), Path("/nowhere/model.onnx"))
