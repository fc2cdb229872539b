"""The sparse residual of a linear in standard operators: gather inputs, multiply, sum rows of equal length, place them.

The rows of the matrix are sorted into buckets by how many entries they have, rounded up to a power of two. A bucket is
then a small dense problem: its inputs are gathered as (rows, entries, tokens), multiplied by its values (zero where a
row is shorter) and summed over the entries. One last Gather puts the sums where they belong; rows without entries take
a row of zeros. No dense matrix, no scatter: TensorRT reads neither ScatterND nor ScatterElements with a reduction, and
onnxruntime adds in the same order whatever the number of threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper

from mixt_export.errors import CheckpointError, MixtError
from mixt_export.lower.builder import MIXT_DOMAIN
from mixt_export.lower.weights import DTYPES
from mixt_export.network import FactorizedLinear, SparseResidual

if TYPE_CHECKING:
    from mixt_export.lower.linear import LinearContext  # which calls this module

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Bucket:
    """Rows of the matrix with about as many entries: ``entries`` (rows, length) int64, -1 where a row is shorter.

    ``rows`` (rows,): which rows of the matrix they are; ``entries`` are positions in the stored vectors.
    """

    rows: Array
    entries: Array


def buckets(rows: Array) -> tuple[Bucket, ...]:
    """Buckets of the row numbers ``rows`` (nnz,), shortest first; their padded lengths are powers of two.

    Padding stores and multiplies less than twice the entries. Duplicate coordinates are entries like others.
    """
    order = np.argsort(rows, kind="stable")
    present, first, counts = np.unique(rows[order], return_index=True, return_counts=True)
    lengths = 1 << np.ceil(np.log2(counts)).astype(np.int64) if len(counts) else counts
    found = []
    for length in np.unique(lengths):
        members = np.flatnonzero(lengths == length)
        offsets = np.arange(length)
        inside = offsets < counts[members, None]
        entries = np.where(inside, order[np.minimum(first[members, None] + offsets, len(order) - 1)], -1)
        found.append(Bucket(present[members], entries))
    return tuple(found)


def lower_sparse(context: LinearContext, factors: FactorizedLinear, x: ir.Value, node: str) -> ir.Value:
    """y (batch, seq, out) = sparse · x for ``factors.sparse``, without branches and bias; ``node`` names the node.

    The index vectors are read (the layout of the graph follows from them), the values are streamed. Raises
    CheckpointError where an index is outside the matrix, MixtError when there is no residual.
    """
    sparse = factors.sparse
    if sparse is None:
        raise MixtError(f"{factors.name}: has no sparse residual to lower. Please report this.")
    builder, weights = context.builder, context.weights
    rows = _indices(context, factors, sparse.rows.name, factors.out_features)
    cols = _indices(context, factors, sparse.cols.name, factors.in_features)
    found = buckets(rows)
    if not found:
        found = (Bucket(np.zeros(1, np.int64), np.full((1, 1), -1)),)
    values: list[ir.Value] = []
    position = np.full(factors.out_features, sum(len(bucket.rows) for bucket in found), np.int32)
    placed = 0
    for number, bucket in enumerate(found):
        position[bucket.rows] = placed + np.arange(len(bucket.rows))
        placed += len(bucket.rows)
        where = np.where(bucket.entries >= 0, cols[bucket.entries] if len(cols) else 0, 0).astype(np.int32)
        stem = f"{factors.name}.sparse.{number}"
        values.append(builder.initializer(weights.computed(f"{stem}.columns", where)))
        values.append(builder.initializer(_values(context, sparse, bucket, f"{stem}.values")))
    values.append(builder.initializer(weights.computed(f"{factors.name}.sparse.rows", position)))
    function = ir.serde.deserialize_function(sparse_function(len(found), builder.opsets[""]))
    builder.function(function)
    return builder.op(
        function.name,
        [x, *values],
        name=node,
        domain=MIXT_DOMAIN,
        dtype=DTYPES[weights.dtype],
        shape=["batch", "seq", factors.out_features],
    )


@cache
def sparse_function(count: int, opset: int) -> onnx.FunctionProto:
    """``mixt::SparseResidual<count>``: y (batch, seq, out) of x (batch, seq, in), ``count`` buckets and the positions.

    ``opset`` (18 or later) is the version of the standard domain that the body is written in.

    Inputs after x: per bucket columns (rows, length) int32 and values (rows, length, 1, 1) in the dtype of x; last
    positions (out,) int32 in the sums of all buckets, one past the end for a row of zeros.
    """
    names = [(f"columns{number}", f"values{number}") for number in range(count)]
    nodes = [
        helper.make_node("Constant", [], ["entries"], name="entries/Constant", value_ints=[1]),
        helper.make_node("Constant", [], ["one_row"], name="one_row/Constant", value_ints=[0, 0, 0, 1, 0, 0]),
        helper.make_node("Transpose", ["x"], ["features_first"], name="features_first/Transpose", perm=[2, 0, 1]),
    ]
    sums = []
    for number, (columns, values) in enumerate(names):
        read, product, total = f"read{number}", f"product{number}", f"sum{number}"
        nodes.append(helper.make_node("Gather", ["features_first", columns], [read], name=f"{read}/Gather", axis=0))
        nodes.append(helper.make_node("Mul", [read, values], [product], name=f"{product}/Mul"))
        nodes.append(
            helper.make_node("ReduceSum", [product, "entries"], [total], name=f"{total}/ReduceSum", keepdims=0)
        )
        sums.append(total)
    if count > 1:
        nodes.append(helper.make_node("Concat", sums, ["sums"], name="sums/Concat", axis=0))
    nodes += [
        helper.make_node("Pad", ["sums" if count > 1 else sums[0], "one_row"], ["padded"], name="padded/Pad"),
        helper.make_node("Gather", ["padded", "rows"], ["rows_first"], name="rows_first/Gather", axis=0),
        helper.make_node("Transpose", ["rows_first"], ["y"], name="y/Transpose", perm=[1, 2, 0]),
    ]
    inputs = ["x", *(name for pair in names for name in pair), "rows"]
    proto = helper.make_function(
        MIXT_DOMAIN, f"SparseResidual{count}", inputs, ["y"], nodes, [helper.make_opsetid("", opset)]
    )
    proto.doc_string = "y = sparse x: rows of equal length at a time, gathered, multiplied, summed, put in place"
    return proto


def _indices(context: LinearContext, factors: FactorizedLinear, name: str, size: int) -> Array:
    """A stored index vector (nnz,) int64, checked against the ``size`` of its side."""
    checkpoint = context.weights.checkpoint
    context.weights.shape(name)
    found = np.asarray(checkpoint.store.read(name)).astype(np.int64)
    if found.size and not (found.min() >= 0 and found.max() < size):
        raise CheckpointError(
            f"{checkpoint.path}: {name!r} points at {int(found.min() if found.min() < 0 else found.max())}, but "
            f"{factors.name} is {factors.in_features} → {factors.out_features}; compress the model again."
        )
    return found


def _values(context: LinearContext, sparse: SparseResidual, bucket: Bucket, name: str) -> ir.TensorProtocol:
    """Values of ``bucket`` (rows, length, 1, 1), zero where a row is shorter."""
    entries = bucket.entries

    def make(load: Any) -> Array:
        stored = np.append(np.asarray(load(sparse.values.name), np.float64), 0.0)
        return np.asarray(stored[entries][:, :, None, None])  # -1 is the appended zero

    return context.weights.derived(name, (*entries.shape, 1, 1), [sparse.values.name], make)
