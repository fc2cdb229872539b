"""Multi-head Tucker with factors shared by all heads and by q, k, v and o (TensorLLM, arXiv:2501.15674)."""

from __future__ import annotations

from mixt_export.errors import NetworkError
from mixt_export.network.build.naming import require_sizes, single
from mixt_export.network.ir import Branch, Core, FactorizedLinear, TensorRef

_PROJECTIONS = ("q", "k", "v", "o")


def tucker_heads(
    name: str,
    projection: str,
    features: int,
    heads: int,
    head_dim: int,
    ranks: tuple[int, int, int],
    *,
    shared: str,
    dtype: str = "float32",
    bias: bool = False,
    method: str = "tucker",
) -> FactorizedLinear:
    """One of q, k, v, o of W[i] = G[i] ×1 U1 ×2 U2 ×3 U3, i over heads; W (features, head_dim, 4) per head.

    ``ranks`` = (R1, R2, R3). The tensors carry the prefix ``shared``: the four projections built with the same prefix
    share them: ``.u1`` (features, R1), ``.core`` (heads, R1, R2, R3), ``.u2`` (head_dim, R2); of U3 (4, R3) each
    projection has its own row, ``.u3.q`` … ``.u3.o`` (R3,). q, k, v map features to heads·head_dim, o maps back.
    Raises NetworkError for another projection or ranks that are not three.
    """
    if projection not in _PROJECTIONS:
        raise NetworkError(
            f"Linear {name!r}: expected a projection of {', '.join(_PROJECTIONS)}, found {projection!r}."
        )
    if len(ranks) != 3:
        raise NetworkError(f"Linear {name!r}: expected three ranks, found {ranks!r}.")
    require_sizes(name, features=features, heads=heads, head_dim=head_dim, ranks=ranks)
    r1, r2, r3 = ranks
    u1 = Core(TensorRef(f"{shared}.u1", (features, r1), dtype), ("d", "a"))
    core = Core(TensorRef(f"{shared}.core", (heads, r1, r2, r3), dtype), ("h", "a", "b", "s"))
    u3 = Core(TensorRef(f"{shared}.u3.{projection}", (r3,), dtype), ("s",))
    u2 = Core(TensorRef(f"{shared}.u2", (head_dim, r2), dtype), ("e", "b"))
    model, split = (("d", features),), (("h", heads), ("e", head_dim))
    backwards = projection == "o"
    branch = Branch(
        split if backwards else model,
        model if backwards else split,
        (u2, core, u3, u1) if backwards else (u1, core, u3, u2),
    )
    return single(name, branch, dtype=dtype, bias=bias, method=method)
