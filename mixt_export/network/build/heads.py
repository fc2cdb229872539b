"""Multi-head Tucker with factors shared by all heads and by q, k, v and o (TensorLLM, arXiv:2501.15674)."""

from __future__ import annotations

from mixt_export.errors import NetworkError
from mixt_export.network.build.naming import require_sizes, single
from mixt_export.network.ir import Branch, Core, FactorizedLinear, Mode, TensorRef

_PROJECTIONS = ("q", "k", "v", "o")

HeadRanks = tuple[int | None, int | None, int | None]
"""(R1, R2, R3) of the features, of a head's features and of the projections; None: that axis has no factor."""


def tucker_heads(
    name: str,
    projection: str,
    features: int,
    heads: int,
    head_dim: int,
    ranks: HeadRanks,
    *,
    shared: str,
    kv_heads: int | None = None,
    dtype: str = "float32",
    bias: bool = False,
    method: str = "tucker",
) -> FactorizedLinear:
    """One of q, k, v, o of W[i] = G[i] ×1 U1 ×2 U2 ×3 U3, i over heads; W (features, head_dim, 4) per head.

    The tensors carry the prefix ``shared``: the four projections built with the same prefix share them: ``.u1``
    (features, R1), ``.core`` (R1, heads, R2, R3), ``.u2`` (head_dim, R2); of U3 each projection has its own row,
    ``.u3.q`` … ``.u3.o`` (R3,). q, k, v map features to heads·head_dim, o maps back.

    With fewer ``kv_heads`` than ``heads`` i runs over the kv heads, each with the r = heads / kv_heads query heads that
    read it: W is (features, head_dim, 2r + 2), and q and o have r rows of U3, ``.u3.q`` and ``.u3.o`` (r, R3).

    A rank that is None stands for an axis without a factor, which the core then has itself: R1 = features, R2 =
    head_dim. Without U3 each projection has a core of its own, ``.core.q`` (R1, kv_heads[, r], R2) and ``.core.o``
    (kv_heads[, r], R2, R1).
    Raises NetworkError for another projection, ranks that are not three, or kv heads that do not divide the heads.
    """
    if projection not in _PROJECTIONS:
        raise NetworkError(
            f"Linear {name!r}: expected a projection of {', '.join(_PROJECTIONS)}, found {projection!r}."
        )
    if len(ranks) != 3:
        raise NetworkError(f"Linear {name!r}: expected three ranks, found {ranks!r}.")
    groups = heads if kv_heads is None else kv_heads
    given = [rank for rank in ranks if rank is not None]
    require_sizes(name, features=features, heads=heads, head_dim=head_dim, ranks=given, kv_heads=groups)
    if heads % groups:
        raise NetworkError(f"Linear {name!r}: expected kv heads that divide {heads} heads, found {groups}.")
    r1, r2, r3 = ranks
    backwards = projection == "o"
    repeats: tuple[Mode, ...] = (("r", heads // groups),) if projection in "qo" and heads > groups else ()
    inner: Mode = ("d", features) if r1 is None else ("a", r1)
    outer: Mode = ("e", head_dim) if r2 is None else ("b", r2)

    def core_of(suffix: str, *modes: Mode) -> Core:
        labels, sizes = zip(*modes, strict=True)
        return Core(TensorRef(f"{shared}.{suffix}", tuple(sizes), dtype), tuple(labels))

    if r3 is None:
        own = (("h", groups), *repeats, outer)
        cores = [core_of(f"core.{projection}", *((*own, inner) if backwards else (inner, *own)))]
    else:
        cores = [
            core_of("core", inner, ("h", groups), outer, ("s", r3)),
            core_of(f"u3.{projection}", *repeats, ("s", r3)),
        ]
    if r1 is not None:
        cores.insert(0, core_of("u1", ("d", features), inner))
    if r2 is not None:
        cores.append(core_of("u2", ("e", head_dim), outer))
    model: tuple[Mode, ...] = (("d", features),)
    split: tuple[Mode, ...] = (("h", groups), *repeats, ("e", head_dim))
    branch = Branch(split, model, tuple(reversed(cores))) if backwards else Branch(model, split, tuple(cores))
    return single(name, branch, dtype=dtype, bias=bias, method=method)
