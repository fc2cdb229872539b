"""Linears with common factors in a decoder: each common step is one node, and the model is the same."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import inliner
from safetensors.numpy import load_file, save_file

from mixt_export.checkpoints import NewTensor, open_checkpoint, write_checkpoint
from mixt_export.network import FactorizedLinear, build, densify
from mixt_export.targets import export
from mixt_export.targets.trt import TrtOptions
from tests.ortrun import Graph, relative
from tests.tiny import write_tiny

LAYER = "model.layers.0"


def factors(ranks: tuple[int | None, int | None, int | None]) -> dict[str, FactorizedLinear]:
    """Grouped heads of the tiny model's first block, gate and up over shared factors."""
    attention, mlp = f"{LAYER}.self_attn", f"{LAYER}.mlp"
    linears = [
        build.tucker_heads(f"{attention}.{role}_proj", role, 48, 4, 16, ranks, shared=f"{attention}.tucker", kv_heads=2)
        for role in "qkvo"
    ]
    linears += [
        build.tucker2(
            f"{mlp}.{name}", 48, 104, 11, 13, names=(f"{mlp}.tucker.u1", f"{mlp}.{name}.core", f"{mlp}.tucker.u2")
        )
        for name in ("gate_proj", "up_proj")
    ]
    return {linear.name: linear for linear in linears}


def write(folder: Path, linears: dict[str, FactorizedLinear]) -> tuple[Path, Path]:
    """A factorised folder and the dense one it stands for."""
    base = write_tiny(folder / "base", num_hidden_layers=2)
    rng = np.random.default_rng(11)
    refs = {ref.name: ref for linear in linears.values() for ref in linear.core_tensors()}
    cores = {
        name: (rng.standard_normal(ref.shape) / max(ref.shape) ** 0.5).astype(np.float32) for name, ref in refs.items()
    }
    new = [NewTensor(name, "float32", core.shape, partial(cores.__getitem__, name)) for name, core in cores.items()]
    (folder / "model").mkdir()
    write_checkpoint(folder / "model", open_checkpoint(base), new, linears, {})
    tensors = load_file(base / "model.safetensors")
    for name, linear in linears.items():
        tensors[f"{name}.weight"] = densify(linear, cores.__getitem__).astype(np.float32)
    save_file(tensors, base / "model.safetensors")
    return folder / "model", base


@pytest.mark.parametrize("target", ["ort", "onnx"])
@pytest.mark.parametrize("ranks", [(12, 6, 2), (12, None, 3), (12, None, None)])
def test_the_model_stays_the_same(
    tmp_path: Path, target: str, ranks: tuple[int | None, int | None, int | None]
) -> None:
    model, base = write(tmp_path, factors(ranks))
    export(model, tmp_path / "out", target=target, optimize_for="memory", verify=False)
    export(base, tmp_path / "dense", target=target, verify=False)
    ids = np.random.default_rng(3).integers(0, 300, (2, 9))
    found, expected = (Graph(tmp_path / name).run(ids)[0] for name in ("out", "dense"))
    assert relative(found, expected) < 1e-5


def products(folder: Path) -> list[tuple[str, int]]:
    """(node, multiply-adds per token) of every MatMul with a weight in the first block, read off the inlined graph."""
    model = inliner.inline_local_functions(onnx.load(folder / "model.onnx", load_external_data=False))
    model = onnx.shape_inference.infer_shapes(model)
    weights = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in model.graph.value_info
    }
    found = []
    for node in model.graph.node:
        read = [name for name in node.input if name in weights and name.startswith(LAYER)]
        if node.op_type == "LowRankLinear":  # of an older opset, which the inliner leaves alone
            found += [(name, int(np.prod(weights[name]))) for name in read]
        elif node.op_type == "MatMul" and read:
            (x,) = [name for name in node.input if name != read[0]]
            right = node.input[1] == read[0]
            found.append((read[0], int(np.prod(shapes[x][2:])) * weights[read[0]][1 if right else 0]))
    return found


def test_common_steps_are_one_node_and_one_tensor(tmp_path: Path) -> None:
    """Multiply-adds counted from the graph are those of the plan: U1 read once by q, k, v and once by gate and up."""
    model, _ = write(tmp_path, factors((12, 6, 2)))
    result = export(model, tmp_path / "out", target="onnx", optimize_for="memory", verify=False)
    counted = products(tmp_path / "out")
    uses = Counter(weight for weight, _ in counted)
    assert uses[f"{LAYER}.self_attn.tucker.u1"] == 1
    assert uses[f"{LAYER}.mlp.tucker.u1"] == 1
    plan = result.manifest["plan"]["forms"]
    dense = 104 * 48  # down
    assert sum(macs for _, macs in counted) == sum(form["macs"] for form in plan.values()) + dense
    assert uses[f"{LAYER}.self_attn.tucker.core.12x24"] == 1  # the second common step, behind the first
    first, second = (f"{LAYER}.self_attn.q_proj+k_proj+v_proj.{core}" for core in ("u1", "core"))
    assert plan[first]["core"] == f"{LAYER}.self_attn.tucker.u1"
    assert [plan[f"{LAYER}.self_attn.{role}_proj"].get("after") for role in "qkvo"] == [second, second, second, None]
    assert plan[second]["after"] == first


def test_an_island_among_them_is_computed_by_itself(tmp_path: Path) -> None:
    """An island reads a scaled input: what the others share of the plain one is nothing to it."""
    model, _ = write(tmp_path, factors((12, 6, 2)))
    islands = TrtOptions(islands=(f"{LAYER}.mlp.gate_proj=3",))
    export(model, tmp_path / "out", target="trt", dtype="fp16", trt=islands, verify=False)
    graph = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph
    heads = [node for node in graph.node if f"{LAYER}.mlp.tucker.u1" in node.input]
    assert len(heads) == 2
    assert len({node.input[0] for node in heads}) == 2
    assert len({node.name for node in heads}) == 2
