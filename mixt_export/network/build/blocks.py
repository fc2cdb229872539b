"""Block-structured matrices: Monarch, block tensor train, BLAST."""

from __future__ import annotations

from collections.abc import Sequence

from mixt_export.errors import NetworkError
from mixt_export.network.build.naming import core_names, require_sizes, single
from mixt_export.network.ir import Branch, Core, FactorizedLinear, TensorRef


def monarch(
    name: str,
    in_modes: tuple[int, int],
    out_modes: tuple[int, int],
    *,
    dtype: str = "float32",
    bias: bool = False,
    names: Sequence[str] | None = None,
    method: str = "monarch",
) -> FactorizedLinear:
    """W = P·L·Pᵀ·R with block-diagonal L and R (Monarch, arXiv:2204.00595).

    x is (k, p), y is (s, l): R holds k blocks, core0 (k, l, p); L holds l blocks, core1 (l, s, k);
    y[s, l] = Σ_k L[l, s, k] Σ_p R[k, l, p] x[k, p].
    """
    require_sizes(name, in_modes=in_modes, out_modes=out_modes)
    (k, p), (s, ell) = _two(name, "in_modes", in_modes), _two(name, "out_modes", out_modes)
    right, left = core_names(name, 2, names)
    branch = Branch(
        (("k", k), ("p", p)),
        (("s", s), ("l", ell)),
        (
            Core(TensorRef(right, (k, ell, p), dtype), ("k", "l", "p")),
            Core(TensorRef(left, (ell, s, k), dtype), ("l", "s", "k")),
        ),
    )
    return single(name, branch, dtype=dtype, bias=bias, method=method)


def block_tensor_train(
    name: str,
    in_modes: tuple[int, int, int],
    out_modes: tuple[int, int, int],
    rank: int,
    *,
    dtype: str = "float32",
    bias: bool = False,
    names: Sequence[str] | None = None,
    method: str = "block_tensor_train",
) -> FactorizedLinear:
    """BTT in the general form of arXiv:2410.02117: Y[d,e,f] = Σ_{a,b,g,r} B[b,g,e,f,r] A[a,g,d,f,r] X[a,b,g].

    ``in_modes`` = (a, b, g), ``out_modes`` = (d, e, f). core0 is A (a, g, d, f, rank), core1 is B (b, g, e, f, rank).
    """
    require_sizes(name, in_modes=in_modes, out_modes=out_modes, rank=rank)
    if len(in_modes) != 3 or len(out_modes) != 3:
        raise NetworkError(
            f"Linear {name!r}: expected three input and three output modes, found {in_modes!r} and {out_modes!r}."
        )
    (a, b, g), (d, e, f) = in_modes, out_modes
    first, second = core_names(name, 2, names)
    branch = Branch(
        (("a", a), ("b", b), ("g", g)),
        (("d", d), ("e", e), ("f", f)),
        (
            Core(TensorRef(first, (a, g, d, f, rank), dtype), ("a", "g", "d", "f", "r")),
            Core(TensorRef(second, (b, g, e, f, rank), dtype), ("b", "g", "e", "f", "r")),
        ),
    )
    return single(name, branch, dtype=dtype, bias=bias, method=method)


def blast(
    name: str,
    in_features: int,
    out_features: int,
    rank: int,
    blocks: tuple[int, int],
    *,
    dtype: str = "float32",
    bias: bool = False,
    names: Sequence[str] | None = None,
    method: str = "blast",
) -> FactorizedLinear:
    """W_ij = B_i · diag(D_ij) · C_jᵀ (BLAST, arXiv:2410.21262) with ``blocks`` = (b1 rows, b2 columns) of blocks.

    core0 is C (b2, rank, in/b2), core1 is D (b1, b2, rank), core2 is B (b1, out/b1, rank): the published layouts.
    """
    b1, b2 = _two(name, "blocks", blocks)
    require_sizes(name, in_features=in_features, out_features=out_features, rank=rank, blocks=blocks)
    if in_features % b2 or out_features % b1:
        raise NetworkError(
            f"Linear {name!r}: expected blocks (b1, b2) that divide out {out_features} and in {in_features}, "
            f"found {tuple(blocks)}."
        )
    c, d, b = core_names(name, 3, names)
    branch = Branch(
        (("j", b2), ("q", in_features // b2)),
        (("b", b1), ("p", out_features // b1)),
        (
            Core(TensorRef(c, (b2, rank, in_features // b2), dtype), ("j", "r", "q")),
            Core(TensorRef(d, (b1, b2, rank), dtype), ("b", "j", "r")),
            Core(TensorRef(b, (b1, out_features // b1, rank), dtype), ("b", "p", "r")),
        ),
    )
    return single(name, branch, dtype=dtype, bias=bias, method=method)


def _two(name: str, argument: str, values: Sequence[int]) -> tuple[int, int]:
    if len(values) != 2:
        raise NetworkError(f"Linear {name!r}: expected two sizes in {argument}, found {values!r}.")
    return values[0], values[1]
