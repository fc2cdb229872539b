"""Structures of plain matrices: dense, low rank, Tucker-2, and a sparse residual on top of any structure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mixt_export.network.build.naming import core_names, require_sizes, single
from mixt_export.network.ir import Branch, Core, FactorizedLinear, SparseResidual, TensorRef


def dense(
    name: str,
    in_features: int,
    out_features: int,
    *,
    dtype: str = "float32",
    bias: bool = False,
    names: Sequence[str] | None = None,
    method: str = "dense",
) -> FactorizedLinear:
    """One core (in, out): y = x · core0. Note that ``torch.nn.Linear`` stores the transpose, (out, in)."""
    require_sizes(name, in_features=in_features, out_features=out_features)
    (weight,) = core_names(name, 1, names)
    branch = Branch(
        (("i", in_features),),
        (("o", out_features),),
        (Core(TensorRef(weight, (in_features, out_features), dtype), ("i", "o")),),
    )
    return single(name, branch, dtype=dtype, bias=bias, method=method)


def low_rank(
    name: str,
    in_features: int,
    out_features: int,
    rank: int,
    *,
    dtype: str = "float32",
    bias: bool = False,
    names: Sequence[str] | None = None,
    method: str = "low_rank",
) -> FactorizedLinear:
    """Two cores (in, rank) and (rank, out): y = (x · core0) · core1, the layout two MatMul nodes read in place."""
    require_sizes(name, in_features=in_features, out_features=out_features, rank=rank)
    first, second = core_names(name, 2, names)
    branch = Branch(
        (("i", in_features),),
        (("o", out_features),),
        (
            Core(TensorRef(first, (in_features, rank), dtype), ("i", "r")),
            Core(TensorRef(second, (rank, out_features), dtype), ("r", "o")),
        ),
    )
    return single(name, branch, dtype=dtype, bias=bias, method=method)


def tucker2(
    name: str,
    in_features: int,
    out_features: int,
    in_rank: int | None,
    out_rank: int | None,
    *,
    dtype: str = "float32",
    bias: bool = False,
    names: Sequence[str] | None = None,
    method: str = "tucker2",
) -> FactorizedLinear:
    """Three cores (in, in_rank), (in_rank, out_rank), (out_rank, out): the Tucker form of a matrix.

    With the outer two shared by name it is TD-MoE's expert or the stacked gate and up of TT-LLM (arXiv:2606.03465).
    A rank that is None stands for a side without a factor: the middle core has the features themselves.
    """
    given = [rank for rank in (in_rank, out_rank) if rank is not None]
    require_sizes(name, in_features=in_features, out_features=out_features, ranks=given)
    inner = ("i", in_features) if in_rank is None else ("c", in_rank)
    outer = ("o", out_features) if out_rank is None else ("b", out_rank)
    modes = [(inner, outer)]
    if in_rank is not None:
        modes.insert(0, (("i", in_features), inner))
    if out_rank is not None:
        modes.append((outer, ("o", out_features)))
    cores = tuple(
        Core(TensorRef(core, (first[1], second[1]), dtype), (first[0], second[0]))
        for core, (first, second) in zip(core_names(name, len(modes), names), modes, strict=True)
    )
    branch = Branch((("i", in_features),), (("o", out_features),), cores)
    return single(name, branch, dtype=dtype, bias=bias, method=method)


def with_sparse(
    linear: FactorizedLinear, nnz: int, *, dtype: str = "float32", index_dtype: str = "int64"
) -> FactorizedLinear:
    """``linear`` plus a COO residual of ``nnz`` entries, ``<linear>.sparse.{rows,cols,values}`` (Saten, TT-LLM)."""
    require_sizes(linear.name, nnz=nnz)
    rows, cols = (TensorRef(f"{linear.name}.sparse.{side}", (nnz,), index_dtype) for side in ("rows", "cols"))
    values = TensorRef(f"{linear.name}.sparse.values", (nnz,), dtype)
    return replace(linear, sparse=SparseResidual(rows, cols, values))
