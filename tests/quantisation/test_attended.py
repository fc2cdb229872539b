"""Moments of what heads mix, against PyTorch's attention weights; that value matrices are rounded by them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from mixt_export.quantisation.blocks import Blocks, dequantised
from mixt_export.quantisation.calibrated import calibrated
from mixt_export.quantisation.calibration import Target, calibrate
from mixt_export.quantisation.segments import Runner, cut
from mixt_export.targets import plan_export
from mixt_export.targets.calibrate import FloatGraph
from tests.tiny import write_tiny, write_tiny_low_rank

#: The width of a head does not divide that of the model.
HEADS, GROUPS, WIDTH = 4, 2, 32
WINDOWS = [np.random.default_rng(seed).integers(3, 90, 21) for seed in (0, 1)]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("dense") / "model", num_hidden_layers=2, head_dim=WIDTH)


@pytest.fixture(scope="module")
def factorised(tmp_path_factory: pytest.TempPathFactory, dense: Path) -> Path:
    return write_tiny_low_rank(tmp_path_factory.mktemp("low_rank") / "model", dense, {"v_proj": 10})


def mixed_by_torch(source: Path, *, apart: bool = False) -> list[NDArray[np.float64]]:
    """For each block (heads, tokens, features): what its value matrix reads, mixed by the weights of each head.

    ``apart``: as it is read, not mixed.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64, attn_implementation="eager")
    read: dict[int, Any] = {}
    for index, block in enumerate(model.model.layers):
        linear = getattr(block.self_attn, "v_proj", None) or block.self_attn.qkv_proj
        linear.register_forward_pre_hook(lambda _m, args, i=index: read.update({i: args[0][0]}))
    found: list[list[Any]] = [[] for _ in model.model.layers]
    with torch.no_grad():
        for window in WINDOWS:
            weights = model(torch.tensor(window[None]), output_attentions=True).attentions
            for index, each in enumerate(weights):
                weight = torch.eye(len(window), dtype=torch.float64).expand_as(each[0]) if apart else each[0]
                found[index].append(torch.einsum("hst,tc->hsc", weight, read[index]).numpy())
    return [np.concatenate(each, axis=1) for each in found]


def graph_of(source: Path, target: str) -> FloatGraph:
    return FloatGraph(plan_export(source, target=target, variants="none"))


def observed(graph: FloatGraph, matrices: list[str]) -> dict[str, list[tuple[slice, NDArray[np.float64]]]]:
    """Moments of every matrix with nothing rounded, by running the pieces of the graph."""
    cache = {name: np.zeros((1, GROUPS, 0, WIDTH), np.float32) for name in _caches(graph.model)}
    states = [
        {"input_ids": window[None].astype(np.int64), "attention_mask": np.ones((1, len(window)), np.int64), **cache}
        for window in WINDOWS
    ]
    found: dict[str, list[tuple[slice, NDArray[np.float64]]]] = {}
    for piece in cut(graph.model, matrices, ("logits",), graph.read):
        held = {name: graph.read(name) for name in piece.matrices}
        runner = Runner(piece.observing, 1)
        sums: dict[str, Any] = {}
        for state in states:
            outputs = runner.run({name: state[name] for name in piece.reads}, held)
            for name, value in outputs.items():
                sums[name] = sums.get(name, 0) + value.astype(np.float64)
            state.update({name: outputs[name] for name in piece.gives})
        for name, parts in piece.observed.items():
            found[name] = [(slice(part.begin, part.end), sums[part.output]) for part in parts]
    return found


def _caches(model: onnx.ModelProto) -> list[str]:
    return [value.name for value in model.graph.input if value.name.startswith("past_key_values")]


def moments(x: NDArray[np.float64]) -> NDArray[np.float64]:
    rows = x.reshape(-1, x.shape[-1])
    found: NDArray[np.float64] = rows.T @ rows
    return found


def close(found: NDArray[np.float64], expected: NDArray[np.float64]) -> bool:
    return bool(np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected))


def test_packed_rows_of_values_have_the_moments_of_each_pair_of_heads(tmp_path: Path) -> None:
    sizes = {"num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "hidden_size": HEADS * WIDTH}
    source = write_tiny(tmp_path / "model", "phi3", num_hidden_layers=2, **sizes)
    names = [f"model.layers.{index}.self_attn.qkv_proj.weight" for index in range(2)]
    found = observed(graph_of(source, "ort"), names)
    for name, mixed in zip(names, mixed_by_torch(source), strict=True):
        (rows, plain), *groups = found[name]
        assert (rows.start, rows.stop) == (0, (HEADS + GROUPS) * WIDTH)
        assert len(groups) == GROUPS
        for group, (rows, gram) in enumerate(groups):
            begin = (HEADS + GROUPS + group) * WIDTH
            assert (rows.start, rows.stop) == (begin, begin + WIDTH)
            share = HEADS // GROUPS
            assert close(gram, moments(mixed[group * share : (group + 1) * share]))
            assert not close(gram, share * plain)


def test_a_standard_attention_gives_the_same(dense: Path) -> None:
    graph = graph_of(dense, "onnx")
    names = [f"model.layers.{index}.self_attn.v_proj.weight" for index in range(2)]
    found = observed(graph, names)
    for name, mixed in zip(names, mixed_by_torch(dense), strict=True):
        assert [(rows.start, rows.stop) for rows, _ in found[name]] == [(0, WIDTH), (WIDTH, 2 * WIDTH)]
        for group, (_, gram) in enumerate(found[name]):
            assert close(gram, moments(mixed[2 * group : 2 * group + 2]))


def test_both_factors_of_values(dense: Path, factorised: Path) -> None:
    """The first by all heads' inputs, the second by what the first makes of them, head by head."""
    graph = graph_of(factorised, "ort")
    first, second = (f"model.layers.0.self_attn.v_proj.core{index}" for index in range(2))
    found = observed(graph, [first, second])
    # Block 0 reads what the dense model's reads, and asks with the same queries and keys.
    mixed = mixed_by_torch(dense)[0]
    ((rows, gram),) = found[first]
    assert (rows.start, rows.stop) == (0, None)
    assert close(gram, moments(mixed))
    behind = mixed @ graph.read(first).astype(np.float64)
    for group, (rows, gram) in enumerate(found[second]):
        assert (rows.start, rows.stop) == (group * WIDTH, (group + 1) * WIDTH)
        assert close(gram, moments(behind[2 * group : 2 * group + 2]))


def test_value_matrices_are_rounded_by_them(dense: Path) -> None:
    graph = graph_of(dense, "onnx")
    name = "model.layers.0.self_attn.v_proj.weight"
    kept: dict[str, Blocks] = {}
    calibrate(graph.model, {name: Target(4, 16, True)}, graph.read, WINDOWS, kept.__setitem__, threads=1)
    weight, mixed, reads = graph.read(name).T, mixed_by_torch(dense)[0], mixed_by_torch(dense, apart=True)[0]
    for group in range(GROUPS):
        rows, gram = slice(group * WIDTH, (group + 1) * WIDTH), moments(mixed[2 * group : 2 * group + 2])
        found = dequantised(kept[name])[rows]
        expected = dequantised(calibrated(weight[rows], gram, 4, 16))
        plain = dequantised(calibrated(weight[rows], moments(reads), 4, 16))
        # Moments differ in the last digit, so a value halfway between two codes may fall otherwise.
        assert np.mean(~np.isclose(found, expected, rtol=1e-3)) < 0.01
        assert np.mean(~np.isclose(found, plain, rtol=1e-3)) > 0.05
