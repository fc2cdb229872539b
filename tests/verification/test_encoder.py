"""Break an exported encoder on purpose: verify must say so, and where."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from mixt_export.checkpoints import open_checkpoint
from mixt_export.errors import UsageError
from mixt_export.targets import export
from mixt_export.verification import Report, VerifyOptions, verify
from tests.tiny_encoder import write_tiny_encoder

OUTSIDE = "embeddings, padding or pooling"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_encoder(tmp_path_factory.mktemp("encoder") / "model")


@pytest.fixture(scope="module")
def good(encoder: Path) -> Path:
    export(encoder, encoder.parent / "out", verify=False)
    return encoder.parent / "out"


def judged(folder: Path, encoder: Path, quick: VerifyOptions) -> Report:
    return verify(folder, encoder, options=quick)


def outcome(report: Report) -> dict[str, bool]:
    return {check.name: check.passed for check in report.checks}


def test_a_correct_export_passes_every_check(encoder: Path, good: Path, quick: VerifyOptions) -> None:
    report = judged(good, encoder, quick)
    assert outcome(report) == dict.fromkeys(("alone", "padded", "second_segment", "redensified"), True)
    assert report.verdict() == "PASSED"
    assert len(report.layers) == 3
    assert report.minimum_tolerance is not None
    assert 0.0 < report.minimum_tolerance < 1e-5
    assert "weights" in report.notes[0]


@pytest.mark.parametrize("kind", ["roberta", "distilbert"])
def test_families_without_segments_skip_that_check(kind: str, tmp_path: Path, quick: VerifyOptions) -> None:
    model = write_tiny_encoder(tmp_path / "model", kind, task=True)
    export(model, tmp_path / "out", verify=False)
    report = judged(tmp_path / "out", model, quick)
    assert outcome(report) == dict.fromkeys(("alone", "padded", "redensified"), True)


def _weights(change: Callable[[dict[str, np.ndarray]], None]) -> Callable[[Path], None]:
    """Change values where they lie: the graph points at offsets in the file."""

    def apply(folder: Path) -> None:
        path = folder / "model.safetensors"
        stored = open_checkpoint(folder).store
        change({name: np.memmap(path, "<f4", "r+", stored[name].offset, stored[name].ref.shape) for name in stored})

    return apply


def _graph(change: Callable[[onnx.ModelProto], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        model = onnx.load(folder / "model.onnx", load_external_data=False)
        change(model)
        onnx.save(model, folder / "model.onnx")

    return apply


def _node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def _swap_query_and_value(tensors: dict[str, np.ndarray]) -> None:
    base = "encoder.layer.1.attention.self"
    names = f"{base}.query.weight", f"{base}.value.weight"
    query, value = (tensors[name].copy() for name in names)
    tensors[names[0]][:], tensors[names[1]][:] = value, query


def _no_bias(tensors: dict[str, np.ndarray]) -> None:
    tensors["encoder.layer.2.output.dense.bias"][:] = 0


def _no_mask(model: onnx.ModelProto) -> None:
    """The node that makes the mask boolean finds every position valid."""
    source = _node(model, "/mask/valid")
    source.op_type = "GreaterOrEqual"
    del source.attribute[:]
    model.graph.initializer.append(numpy_helper.from_array(np.array(0, np.int64), "nothing"))
    source.input.append("nothing")


def _no_segments(model: onnx.ModelProto) -> None:
    gather = _node(model, "/embeddings/segments")
    zero = numpy_helper.from_array(np.zeros((1, 1), np.int64), "first_segment")
    model.graph.initializer.append(zero)
    gather.input[1] = "first_segment"


def _mean_over_padding(model: onnx.ModelProto) -> None:
    _node(model, "/pooling/sum").input[0] = _node(model, "/pooling/kept").input[0]


def _large_eps(model: onnx.ModelProto) -> None:
    node = _node(model, "/encoder/layer.0/norm/LayerNormalization")
    next(attribute for attribute in node.attribute if attribute.name == "epsilon").f = 1e-2


def _shifted_positions(model: onnx.ModelProto) -> None:
    one = numpy_helper.from_array(np.array(1, np.int64), "first_position")
    end = onnx.helper.make_node(
        "Add", [_node(model, "/positions/ids").input[1], "first_position"], ["longer"], "longer"
    )
    model.graph.initializer.append(one)
    ranges = _node(model, "/positions/ids")
    model.graph.node.insert(list(model.graph.node).index(ranges), end)
    ranges.input[0], ranges.input[1] = "first_position", "longer"


#: fault -> (how, what the report must name, checks that must still pass)
FAULTS: dict[str, tuple[Callable[[Path], None], str, set[str]]] = {
    "swapped weights": (_weights(_swap_query_and_value), "layer.1", set()),
    "dropped bias": (_weights(_no_bias), "layer.2", set()),
    "wrong eps": (_graph(_large_eps), "layer.0", set()),
    "mask ignored": (_graph(_no_mask), OUTSIDE, {"alone", "second_segment"}),
    "segments ignored": (_graph(_no_segments), OUTSIDE, {"alone", "padded"}),
    "pooling counts padding": (_graph(_mean_over_padding), OUTSIDE, {"alone", "second_segment"}),
    "positions shifted": (_graph(_shifted_positions), "layer.0", set()),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught_and_named(
    fault: str, encoder: Path, good: Path, tmp_path: Path, quick: VerifyOptions
) -> None:
    change, where, unharmed = FAULTS[fault]
    broken = tmp_path / "broken"
    shutil.copytree(good, broken)
    change(broken)
    report = judged(broken, encoder, quick)
    assert not report.passed
    assert report.first_diverging_layer == where
    passed = {name for name, fine in outcome(report).items() if fine}
    assert unharmed <= passed
    assert all(check.reason for check in report.checks if not check.passed)


def test_another_models_folder_is_refused(encoder: Path, good: Path, tmp_path: Path, quick: VerifyOptions) -> None:
    short = write_tiny_encoder(tmp_path / "short", num_hidden_layers=1)
    with pytest.raises(UsageError, match="has 1 blocks, the exported model 3"):
        judged(good, short, quick)
    with pytest.raises(UsageError, match="is not a folder"):
        judged(good, tmp_path / "absent", quick)


def test_report_is_written(encoder: Path, good: Path, tmp_path: Path, quick: VerifyOptions) -> None:
    folder = tmp_path / "out"
    shutil.copytree(good, folder)
    verify(folder, encoder, options=VerifyOptions(**{**vars(quick), "write": True}))
    assert (folder / "report.json").is_file()
    assert "Every sequence alone" in (folder / "report.html").read_text(encoding="utf-8")
