"""The texts of the tensor-train functions: one rule, no file more or less, and they compute the tensor train."""

from __future__ import annotations

import os
from dataclasses import replace
from math import prod

import numpy as np
import pytest

from mixt_export.lower.fused import fused_node
from mixt_export.network import Core, FactorizedLinear, build, densify
from mixt_export.plan.merged import Merged, merge
from mixt_export.resources import resource
from mixt_export.runtime import toolkit
from tests.lower.test_functions import call, text_function
from tests.lower.tt_ops import OPS, name, text

FOLDER = resource("graphs") / "ops"
#: Modes with a last input mode that kernels take (a multiple of 8).
MODES = {2: ((5, 8), (7, 6))}


@pytest.mark.parametrize(("cores", "bias"), OPS)
def test_the_text_follows_the_rule(cores: int, bias: bool) -> None:
    path = FOLDER / f"{name(cores, bias)}.onnxtxt"
    if os.environ.get("MIXT_UPDATE_GOLDEN"):
        path.write_text(text(cores, bias), encoding="utf-8")
    assert path.read_text(encoding="utf-8") == text(cores, bias)


def test_there_are_no_others() -> None:
    assert {path.stem for path in FOLDER.glob("TTLinear*.onnxtxt")} == {name(*op) for op in OPS}
    assert {cores for cores, _ in OPS} == {toolkit("tactics").CORES}


@pytest.mark.parametrize(("batch", "seq"), [(1, 1), (2, 3), (3, 1)])
@pytest.mark.parametrize(("cores", "bias"), OPS)
def test_the_text_computes_a_tensor_train(cores: int, bias: bool, batch: int, seq: int) -> None:
    inside, outside = MODES[cores]
    linear = build.tensor_train("w", inside, outside, (16,), bias=bias)
    rng = np.random.default_rng(cores)
    tensors = {ref.name: rng.standard_normal(ref.shape).astype(np.float32) for ref in linear.tensors()}
    node = fused_node(linear, "float16", largest_waste=1e9)
    assert node is not None and node.op_type == name(cores, bias)
    dense = np.ones((1, 1, 1))
    for site in range(cores):
        core = tensors[linear.branches[0].cores[site].tensor.name].astype(np.float64)
        dense = np.einsum("ior,rpjs->ijops", dense, core).reshape(
            prod(inside[: site + 1]), prod(outside[: site + 1]), -1
        )
    x = rng.standard_normal((batch, seq, prod(inside))).astype(np.float32)
    expected = x.astype(np.float64) @ dense[:, :, 0]
    if bias:
        expected = expected + tensors[linear.bias.name]
    arrays = [tensor.make(tensors.__getitem__).astype(np.float32) for tensor in node.tensors]
    arrays += [tensors[linear.bias.name]] if bias else []
    found = call(text_function(node.op_type), x, *arrays, **node.attributes)
    assert found.shape == expected.shape
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 1e-6


def _permuted(linear: FactorizedLinear) -> FactorizedLinear:
    """The same kind of network with every core's axes reversed and a scale."""
    (branch,) = linear.branches
    cores = [Core(replace(c.tensor, shape=c.tensor.shape[::-1]), c.labels[::-1]) for c in branch.cores]
    return replace(linear, branches=(replace(branch, cores=tuple(cores[::-1]), scale=0.5),))


CHAINS = {
    "two sites in a ring": build.tensor_ring("w", (4, 8), (3, 5), (2, 3)),
    "a sum of Kronecker products": build.kronecker("w", (4, 8), (3, 5), 3),
    "axes in another order, cores too": _permuted(build.tensor_train("w", (4, 8), (3, 5), (6,))),
}


@pytest.mark.parametrize("what", CHAINS)
def test_whatever_is_a_chain_becomes_one(what: str) -> None:
    linear = CHAINS[what]
    rng = np.random.default_rng(1)
    tensors = {ref.name: rng.standard_normal(ref.shape).astype(np.float32) for ref in linear.tensors()}
    _computes(Merged(linear, {}), tensors, densify(linear, tensors.__getitem__))


def test_merged_cores_become_one_site() -> None:
    linear = build.tensor_train("w", (3, 4, 2, 4), (2, 2, 3, 5), (3, 4, 6))
    rng = np.random.default_rng(2)
    tensors = {ref.name: rng.standard_normal(ref.shape).astype(np.float32) for ref in linear.tensors()}
    merged = merge(linear, [((0, 1), (2, 3))])
    _computes(merged, tensors, densify(linear, tensors.__getitem__))


def _computes(merged: Merged, tensors: dict[str, np.ndarray], dense: np.ndarray) -> None:
    """The node for ``merged`` computes x -> dense x, ``dense`` (out, in)."""
    node = fused_node(merged, "float16", largest_waste=1e9)
    assert node is not None
    x = np.random.default_rng(3).standard_normal((2, 3, dense.shape[1])).astype(np.float32)
    arrays = [tensor.make(tensors.__getitem__).astype(np.float32) for tensor in node.tensors]
    assert [array.shape for array in arrays] == [tensor.shape for tensor in node.tensors]
    for tensor, array in zip(node.tensors, arrays, strict=True):
        assert not tensor.stored or np.array_equal(array.ravel(), tensors[tensor.name].ravel())
    found = call(text_function(node.op_type), x, *arrays, **node.attributes)
    expected = x.astype(np.float64) @ dense.T
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 1e-6
