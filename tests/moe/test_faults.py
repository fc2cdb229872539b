"""Break the experts of an exported graph on purpose: verify must say so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch

from mixt_export.targets import export
from mixt_export.verification import VerifyOptions, verify
from tests.moe.folders import write_factorised

torch.set_num_threads(1)
QUICK = VerifyOptions(positions=40, greedy_tokens=4, memory=False, threads=1, write=False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base = tmp_path_factory.mktemp("moe")
    model = write_factorised(base)
    export(model, base / "out", target="onnx", max_seq_len=96, verify=False)
    return model, base / "out"


def _exchanged(graph: onnx.GraphProto, one: str, other: str) -> None:
    """Every reader of the value ``one`` reads ``other`` and the other way round."""
    swap = {one: other, other: one}
    for node in graph.node:
        node.input[:] = [swap.get(name, name) for name in node.input]


def swapped_experts(graph: onnx.GraphProto) -> None:
    stem = "model.layers.2.mlp.experts"
    _exchanged(graph, f"{stem}.1.up_proj.core", f"{stem}.4.up_proj.core")


def another_layers_factor(graph: onnx.GraphProto) -> None:
    _exchanged(graph, *(f"model.layers.{layer}.mlp.experts.gate_proj.u_in" for layer in (0, 2)))


def raw_router_weights(graph: onnx.GraphProto) -> None:
    node = next(node for node in graph.node if node.name == "/model/layers.0/mlp/router/normalised")
    node.op_type = "Identity"
    del node.input[1:]


def worst_experts(graph: onnx.GraphProto) -> None:
    node = next(node for node in graph.node if node.name == "/model/layers.2/mlp/router/TopK")
    next(entry for entry in node.attribute if entry.name == "largest").i = 0


FAULTS: dict[Callable[[onnx.GraphProto], None], str] = {
    swapped_experts: "model.layers.2",
    another_layers_factor: "model.layers.0",
    raw_router_weights: "model.layers.0",
    worst_experts: "model.layers.2",
}


def test_the_sound_export_passes(folders: tuple[Path, Path]) -> None:
    report = verify(folders[1], folders[0], options=QUICK)
    assert report.passed, [check for check in report.checks if not check.passed]
    assert report.minimum_tolerance is not None and report.minimum_tolerance < 1e-5


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught_and_named(folders: tuple[Path, Path], fault: Callable[[onnx.GraphProto], None]) -> None:
    model, out = folders
    path = out / "model.onnx"
    sound = path.read_bytes()
    proto = onnx.load(path, load_external_data=False)
    fault(proto.graph)
    try:
        path.write_bytes(proto.SerializeToString())
        report = verify(out, model, options=QUICK)
    finally:
        path.write_bytes(sound)
    assert not report.passed
    assert report.first_diverging_layer == FAULTS[fault]
    assert report.minimum_tolerance is not None and report.minimum_tolerance > 1e-3
