"""Every known structure with an oracle written without labels: Kronecker products, block matrices and loops."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from itertools import product

import numpy as np

from mixt_export.network import FactorizedLinear, build

Values = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    linear: FactorizedLinear
    matrix: Callable[[Values], np.ndarray]
    """(out, in) in float64, of the branches and the sparse residual."""


def random_values(linear: FactorizedLinear, seed: int, dtype: str = "float64") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    values: dict[str, np.ndarray] = {}
    for tensor in linear.tensors():
        if tensor.name.endswith(".rows"):
            values[tensor.name] = rng.integers(0, linear.out_features, tensor.shape)
        elif tensor.name.endswith(".cols"):
            values[tensor.name] = rng.integers(0, linear.in_features, tensor.shape)
        else:
            values[tensor.name] = rng.standard_normal(tensor.shape).astype(dtype)
    return values


def core(name: str, index: int) -> str:
    return f"{name}.core{index}"


def chain_matrix(name: str, values: Values, in_modes: tuple[int, ...], out_modes: tuple[int, ...]) -> np.ndarray:
    """Entry by entry: the trace of the product of the cores' (r, r) slices; a train is a ring with r_0 = 1."""
    cores = [values[core(name, site)] for site in range(len(in_modes))]
    matrix = np.zeros((int(np.prod(out_modes)), int(np.prod(in_modes))))
    for row, outs in enumerate(np.ndindex(*out_modes)):
        for column, ins in enumerate(np.ndindex(*in_modes)):
            slices = [g[:, o, i, :] for g, o, i in zip(cores, outs, ins, strict=True)]
            matrix[row, column] = np.trace(reduce(np.matmul, slices))
    return matrix


def kronecker_matrix(name: str, values: Values, sites: int) -> np.ndarray:
    cores = [values[core(name, site)] for site in range(sites)]
    return sum(reduce(np.kron, [g[term] for g in cores]) for term in range(len(cores[0])))


def mixt_matrix(names: list[str], values: Values, bond: int) -> np.ndarray:
    terms = len(names)
    total = 0.0
    for k, name in enumerate(names, 1):
        left, right = np.eye(bond ** (k - 1)), np.eye(bond ** (terms - k))
        total = total + np.kron(np.kron(left, values[name]), right)
    return total / terms


def block_diagonal(blocks: np.ndarray) -> np.ndarray:
    count, height, width = blocks.shape
    matrix = np.zeros((count * height, count * width))
    for index, block in enumerate(blocks):
        matrix[index * height : (index + 1) * height, index * width : (index + 1) * width] = block
    return matrix


def transposition(rows: int, columns: int) -> np.ndarray:
    """Permutation matrix that turns a row-major (rows, columns) vector into (columns, rows)."""
    matrix = np.zeros((rows * columns, rows * columns))
    for i, j in product(range(rows), range(columns)):
        matrix[j * rows + i, i * columns + j] = 1.0
    return matrix


def monarch_matrix(name: str, values: Values) -> np.ndarray:
    right, left = values[core(name, 0)], values[core(name, 1)]
    k, ell, _ = right.shape
    s = left.shape[1]
    return transposition(ell, s) @ block_diagonal(left) @ transposition(k, ell) @ block_diagonal(right)


def btt_matrix(name: str, values: Values, in_modes: tuple[int, ...], out_modes: tuple[int, ...]) -> np.ndarray:
    first, second = values[core(name, 0)], values[core(name, 1)]
    matrix = np.zeros((int(np.prod(out_modes)), int(np.prod(in_modes))))
    for row, (d, e, f) in enumerate(np.ndindex(*out_modes)):
        for column, (a, b, g) in enumerate(np.ndindex(*in_modes)):
            matrix[row, column] = first[a, g, d, f] @ second[b, g, e, f]
    return matrix


def blast_matrix(name: str, values: Values) -> np.ndarray:
    c, d, b = (values[core(name, index)] for index in range(3))
    return np.block([[b[i] @ np.diag(d[i, j]) @ c[j] for j in range(len(c))] for i in range(len(b))])


def heads_matrix(shared: str, projection: str, values: Values) -> np.ndarray:
    u1, g, u2, u3 = (values[f"{shared}.{part}"] for part in ("u1", "core", "u2", f"u3.{projection}"))
    heads = [u1 @ sum(u3[s] * g[:, head, :, s] for s in range(len(u3))) @ u2.T for head in range(g.shape[1])]
    stacked = np.concatenate(heads, axis=1)
    return stacked if projection == "o" else stacked.T


def grouped_heads_matrix(shared: str, projection: str, values: Values) -> np.ndarray:
    """Query heads in groups: head h·r + j has row j of U3 and the core of kv head h."""
    u1, g, u2, u3 = (values[f"{shared}.{part}"] for part in ("u1", "core", "u2", f"u3.{projection}"))
    rows = u3 if u3.ndim == 2 else u3[None]
    heads = [u1 @ np.tensordot(g[:, head], row, axes=([2], [0])) @ u2.T for head in range(g.shape[1]) for row in rows]
    stacked = np.concatenate(heads, axis=1)
    return stacked if projection == "o" else stacked.T


def own_core_heads_matrix(shared: str, projection: str, values: Values) -> np.ndarray:
    """Without U2 and U3: each head a block of columns of U1 times the projection's own core."""
    u1, core = values[f"{shared}.u1"], values[f"{shared}.core.{projection}"]
    if projection == "o":
        return u1 @ core.reshape(-1, u1.shape[1]).T
    return (u1 @ core.reshape(u1.shape[1], -1)).T


def with_coordinates(name: str, values: Values, matrix: np.ndarray) -> np.ndarray:
    total = matrix.copy()
    entries = (values[f"{name}.sparse.{part}"] for part in ("rows", "cols", "values"))
    for row, column, value in zip(*entries, strict=True):
        total[row, column] += value
    return total


def product_of(name: str, count: int) -> Callable[[Values], np.ndarray]:
    return lambda values: reduce(np.matmul, [values[core(name, index)] for index in range(count)]).T


def _mixt(name: str, in_features: int, out_features: int, terms: int, **options: object) -> Case:
    bond = int(options.get("bond", 2))  # type: ignore[call-overload]
    names = [f"{name}.branch{k}.core0" for k in range(terms)] if terms > 1 else [core(name, 0)]
    return Case(
        build.mixt(name, in_features, out_features, terms, **options),  # type: ignore[arg-type]
        lambda values: mixt_matrix(names, values, bond)[:out_features, :in_features],
    )


CASES = [
    Case(build.dense("dense", 7, 5), product_of("dense", 1)),
    Case(build.dense("one", 1, 1, bias=True), product_of("one", 1)),
    Case(build.low_rank("low_rank", 7, 5, 3, bias=True), product_of("low_rank", 2)),
    Case(build.low_rank("rank_one", 6, 9, 1), product_of("rank_one", 2)),
    Case(build.tucker2("tucker2", 7, 5, 3, 2), product_of("tucker2", 3)),
    Case(build.kronecker("kron", (3, 5), (2, 7), 3), lambda v: kronecker_matrix("kron", v, 2)),
    Case(build.kronecker("kron1", (5, 3), (2, 7)), lambda v: kronecker_matrix("kron1", v, 2)),
    Case(build.kronecker("kron3", (3, 5, 2), (2, 3, 3), 2), lambda v: kronecker_matrix("kron3", v, 3)),
    Case(
        build.kronecker("tied", (3, 3), (2, 2), 2, names=("tied.core0", "tied.core0")),
        lambda v: sum(np.kron(v["tied.core0"][t], v["tied.core0"][t]) for t in range(2)),
    ),
    Case(build.tensor_train("tt1", (3,), (2,), ()), lambda v: chain_matrix("tt1", v, (3,), (2,))),
    Case(build.tensor_train("tt2", (3, 5), (7, 2), (4,)), lambda v: chain_matrix("tt2", v, (3, 5), (7, 2))),
    Case(
        build.tensor_train("tt3", (3, 5, 2), (2, 3, 4), (4, 3), bias=True),
        lambda v: chain_matrix("tt3", v, (3, 5, 2), (2, 3, 4)),
    ),
    Case(
        build.tensor_train("tt5", (2, 1, 3, 2, 2), (1, 3, 2, 2, 2), (2, 3, 3, 2)),
        lambda v: chain_matrix("tt5", v, (2, 1, 3, 2, 2), (1, 3, 2, 2, 2)),
    ),
    Case(
        build.tensor_ring("ring", (3, 5, 2), (2, 3, 4), (4, 3, 2)),
        lambda v: chain_matrix("ring", v, (3, 5, 2), (2, 3, 4)),
    ),
    Case(build.tensor_ring("ring2", (3, 5), (2, 3), (4, 3)), lambda v: chain_matrix("ring2", v, (3, 5), (2, 3))),
    Case(build.monarch("monarch", (3, 5), (7, 4), bias=True), lambda v: monarch_matrix("monarch", v)),
    Case(
        build.block_tensor_train("btt", (3, 5, 2), (4, 2, 3), 2),
        lambda v: btt_matrix("btt", v, (3, 5, 2), (4, 2, 3)),
    ),
    Case(build.blast("blast", 15, 14, 4, (7, 3)), lambda v: blast_matrix("blast", v)),
    Case(
        build.tucker_heads("heads.q", "q", 21, 3, 5, (4, 3, 2), shared="heads", bias=True),
        lambda v: heads_matrix("heads", "q", v),
    ),
    Case(
        build.tucker_heads("heads.o", "o", 21, 3, 5, (4, 3, 2), shared="heads"),
        lambda v: heads_matrix("heads", "o", v),
    ),
    *(
        Case(
            build.tucker_heads(f"gqa.{side}", side, 21, 6, 5, (4, 3, 5), shared="gqa", kv_heads=2),
            lambda v, side=side: grouped_heads_matrix("gqa", side, v),
        )
        for side in "qko"
    ),
    *(
        Case(
            build.tucker_heads(f"own.{side}", side, 21, 6, 5, (4, None, None), shared="own", kv_heads=2),
            lambda v, side=side: own_core_heads_matrix("own", side, v),
        )
        for side in "qvo"
    ),
    _mixt("mixt", 24, 40, 4),
    _mixt("mixt_one", 24, 11, 1),
    _mixt("mixt_padded", 24, 11, 3, paper_padding=True, bias=True),
    _mixt("mixt_bond3", 27, 9, 3, bond=3),
    _mixt("mixt_bond3_padded", 20, 31, 2, bond=3, paper_padding=True),
]

SPARSE_CASES = [
    Case(
        build.with_sparse(build.tensor_train("saten", (3, 5), (2, 3), (4,), bias=True), 19),
        lambda v: with_coordinates("saten", v, chain_matrix("saten", v, (3, 5), (2, 3))),
    ),
    Case(
        build.with_sparse(build.dense("slim", 7, 5), 4, index_dtype="int32"),
        lambda v: with_coordinates("slim", v, v["slim.core0"].T),
    ),
]


def identity(case: Case) -> str:
    return case.linear.name


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
