"""MixT (Tensor Mixture, arXiv:2605.25344): W = (1/N) Σ_k I_{a_k} ⊗ T_k ⊗ I_{c_k} with a_k·c_k = S = d^(N-1)."""

from __future__ import annotations

from collections.abc import Sequence

from mixt_export.errors import NetworkError
from mixt_export.network import limits
from mixt_export.network.build.naming import bias_of, core_names, require_sizes
from mixt_export.network.ir import Branch, Core, FactorizedLinear, TensorRef


def mixt(
    name: str,
    in_features: int,
    out_features: int,
    terms: int,
    *,
    bond: int = 2,
    paper_padding: bool = False,
    dtype: str = "float32",
    bias: bool = False,
    names: Sequence[str] | None = None,
    method: str = "mixt",
) -> FactorizedLinear:
    """``terms`` = N branches of one core T_k (out/S, in/S) each, local dimension ``bond`` = d, scale 1/N.

    Branch k (from 1) views x as (a = d^(k-1), in/S, c = d^(N-k)) and applies T_k to the middle. Without
    ``paper_padding`` S must divide both features. With it, features are zero-padded at the end to powers of d first, as
    the paper publishes it (a different family of matrices unless the features are powers of d already).
    Raises NetworkError when S does not divide the (padded) features.
    """
    require_sizes(name, in_features=in_features, out_features=out_features, terms=terms)
    if bond < 2:
        raise NetworkError(f"Linear {name!r}: expected a local dimension bond of at least 2, found {bond}.")
    if terms > limits.MAX_BRANCHES:
        raise NetworkError(f"Linear {name!r}: expected at most {limits.MAX_BRANCHES} terms, found {terms}.")
    spectators = bond ** (terms - 1)
    wide_in = _power(in_features, bond) if paper_padding else in_features
    wide_out = _power(out_features, bond) if paper_padding else out_features
    if wide_in % spectators or wide_out % spectators:
        raise NetworkError(
            f"Linear {name!r}: expected features that {bond}^{terms - 1} = {spectators} divides, "
            f"found in {wide_in} and out {wide_out}; take fewer terms."
        )
    shape = (wide_out // spectators, wide_in // spectators)
    if names is not None and len(names) != terms:
        raise NetworkError(f"Linear {name!r}: expected {terms} core names, found {len(names)}.")
    branches = []
    for k in range(terms):
        override = None if names is None else [names[k]]
        (core,) = core_names(name, 1, override, branch=k if terms > 1 else None)
        left, right = ("a", bond**k), ("c", bond ** (terms - 1 - k))
        branches.append(
            Branch(
                (left, ("j", shape[1]), right),
                (left, ("o", shape[0]), right),
                (Core(TensorRef(core, shape, dtype), ("o", "j")),),
                scale=1.0 / terms,
                padded=paper_padding,
            )
        )
    return FactorizedLinear(
        name, in_features, out_features, tuple(branches), bias_of(name, out_features, dtype, bias), method
    )


def _power(features: int, bond: int) -> int:
    """Smallest power of ``bond`` that is at least ``features``."""
    power = 1
    while power < features:
        power *= bond
    return power
