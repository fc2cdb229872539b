"""The sparse branch through onnxruntime against a float64 matrix summed entry by entry."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from mixt_export.checkpoints import NewTensor, open_checkpoint, write_checkpoint
from mixt_export.errors import CheckpointError
from mixt_export.lower.builder import GraphBuilder
from mixt_export.lower.dialects import DIALECTS, check_dialect
from mixt_export.lower.linear import LinearContext
from mixt_export.lower.sparse import buckets, lower_sparse
from mixt_export.lower.weights import DTYPES, Weights, write_streamed
from mixt_export.network import FactorizedLinear, SparseResidual, TensorRef, build
from tests.tiny import write_tiny

UP = "model.layers.0.mlp.up_proj"
IN, OUT = 48, 104


def residual(folder: Path, coo: Mapping[str, np.ndarray], index_dtype: str = "int32") -> FactorizedLinear:
    """Write a model folder whose up projection is rank 1 of zeros plus ``coo``; returns the linear."""
    dtypes = {"rows": index_dtype, "cols": index_dtype, "values": "float32"}
    refs = {side: TensorRef(f"{UP}.sparse.{side}", coo[side].shape, dtype) for side, dtype in dtypes.items()}
    linear = replace(build.low_rank(UP, IN, OUT, 1), sparse=SparseResidual(**refs))
    arrays = {f"{UP}.sparse.{side}": array for side, array in coo.items()}
    arrays |= {tensor.name: np.zeros(tensor.shape, np.float32) for tensor in linear.core_tensors()}
    new = [
        NewTensor(t.name, t.dtype, t.shape, lambda a=arrays[t.name], d=t.dtype: a.astype(d)) for t in linear.tensors()
    ]
    folder.mkdir()
    write_checkpoint(
        folder, open_checkpoint(write_tiny(folder.parent / "base", num_hidden_layers=1)), new, {UP: linear}, {}
    )
    return linear


def matrix(coo: Mapping[str, np.ndarray]) -> np.ndarray:
    found = np.zeros((OUT, IN))
    for row, col, value in zip(coo["rows"], coo["cols"], coo["values"], strict=True):
        found[row, col] += np.float64(value)
    return found


def lowered(folder: Path, linear: FactorizedLinear, dtype: str = "float32", dialect: str = "portable") -> Path:
    chosen = DIALECTS[dialect]
    weights = Weights(open_checkpoint(folder), dtype)
    builder = GraphBuilder("sparse", chosen.opset, chosen.ir_version)
    x = builder.input("x", DTYPES[dtype], ["batch", "seq", IN])
    builder.output(lower_sparse(LinearContext(builder, weights, False, {}), linear, x, "/sparse"), "y")
    model = builder.model({}, "0")
    check_dialect(model, chosen)
    path = folder / "sparse.onnx"
    onnx.save(ir.to_proto(model), path)
    write_streamed(weights, folder)
    onnx.checker.check_model(str(path), full_check=True)
    return path


def run(path: Path, x: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


def coordinates(seed: int, kind: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    count = {"one": 1, "empty": 0, "column": OUT}.get(kind, 301)
    rows, cols = rng.integers(0, OUT, count), rng.integers(0, IN, count)
    if kind == "skewed":
        rows = np.minimum(OUT - 1, rng.pareto(0.7, count).astype(np.int64))
    if kind == "duplicates":
        rows[100:250], cols[100:250] = rows[:150] % 7, cols[:150] % 5
    if kind == "one row":
        rows[:] = OUT - 1
    if kind == "column":
        rows[:] = rng.permutation(OUT)
    return {"rows": rows, "cols": cols, "values": rng.standard_normal(count).astype(np.float32)}


KINDS = ("spread", "skewed", "duplicates", "one row", "one", "column", "empty")


@pytest.mark.parametrize("kind", KINDS)
def test_computes_the_matrix(tmp_path: Path, kind: str) -> None:
    coo = coordinates(KINDS.index(kind), kind)
    path = lowered(tmp_path / "model", residual(tmp_path / "model", coo))
    dense, rng = matrix(coo), np.random.default_rng(1)
    for shape in ((1, 1), (1, 7), (3, 1), (2, 5)):
        x = rng.standard_normal((*shape, IN)).astype(np.float32)
        expected = x.astype(np.float64) @ dense.T
        np.testing.assert_allclose(run(path, x), expected, rtol=1e-5, atol=1e-5)


def test_a_wrong_place_would_show(tmp_path: Path) -> None:
    """The same values one row further down are far beyond the tolerance."""
    coo = coordinates(5, "spread")
    path = lowered(tmp_path / "model", residual(tmp_path / "model", coo))
    x = np.random.default_rng(2).standard_normal((1, 3, IN)).astype(np.float32)
    assert np.abs(run(path, x) - x @ np.roll(matrix(coo), 1, axis=0).T).max() > 0.1


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_holds_it(tmp_path: Path, dialect: str) -> None:
    coo = coordinates(6, "skewed")
    path = lowered(tmp_path / "model", residual(tmp_path / "model", coo, "int64"), "float16", dialect)
    x = np.random.default_rng(3).standard_normal((2, 4, IN)).astype(np.float16)
    expected = x.astype(np.float64) @ matrix(coo).T
    assert np.linalg.norm(run(path, x) - expected) < 3e-3 * np.linalg.norm(expected)


def test_holds_entries_not_a_matrix(tmp_path: Path) -> None:
    """Constants are at most twice the entries, twice (columns and values), and a position per output."""
    coo = coordinates(7, "skewed")
    path = lowered(tmp_path / "model", residual(tmp_path / "model", coo))
    constants = sum(int(np.prod(t.dims)) for t in onnx.load(path, load_external_data=False).graph.initializer)
    assert constants < 4 * len(coo["values"]) + OUT


@pytest.mark.parametrize(("side", "index"), [("rows", OUT), ("cols", IN), ("rows", -1)])
def test_indices_outside_are_refused(tmp_path: Path, side: str, index: int) -> None:
    coo = coordinates(8, "spread")
    coo[side][17] = index
    linear = residual(tmp_path / "model", coo)
    with pytest.raises(CheckpointError, match=rf"{side}.*points at {index}"):
        lowered(tmp_path / "model", linear)


def test_buckets_cover_each_entry_once() -> None:
    rows = np.array([5, 0, 5, 2, 5, 2, 9])
    found = buckets(rows)
    assert [bucket.entries.shape[1] for bucket in found] == [1, 2, 4]
    entries = np.concatenate([bucket.entries.ravel() for bucket in found])
    assert sorted(entries[entries >= 0]) == list(range(len(rows)))
    for bucket in found:
        for row, members in zip(bucket.rows, bucket.entries, strict=True):
            assert set(rows[members[members >= 0]]) == {row}
