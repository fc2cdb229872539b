"""Chains and rings of cores: Kronecker sums, tensor trains (matrix product operators), tensor rings."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from mixt_export.errors import NetworkError
from mixt_export.network.build.naming import core_names, require_sizes, single
from mixt_export.network.ir import Branch, Core, FactorizedLinear, Mode, TensorRef


def kronecker(
    name: str,
    in_modes: Sequence[int],
    out_modes: Sequence[int],
    terms: int = 1,
    *,
    dtype: str = "float32",
    bias: bool = False,
    names: Sequence[str] | None = None,
    method: str = "kronecker",
) -> FactorizedLinear:
    """W = Σ_t A1_t ⊗ A2_t ⊗ …: one core (terms, out_modes[k], in_modes[k]) per site (KroneckerBERT, KnGPT2).

    The sum is one bond that all cores share, so that each input is read once.
    """
    inputs, outputs = _sites(name, in_modes, out_modes, minimum=2)
    require_sizes(name, terms=terms)
    cores = tuple(
        Core(TensorRef(core, (terms, out[1], inp[1]), dtype), ("t", out[0], inp[0]))
        for core, inp, out in zip(core_names(name, len(inputs), names), inputs, outputs, strict=True)
    )
    return single(name, Branch(inputs, outputs, cores), dtype=dtype, bias=bias, method=method)


def tensor_train(
    name: str,
    in_modes: Sequence[int],
    out_modes: Sequence[int],
    ranks: Sequence[int],
    *,
    dtype: str = "float32",
    bias: bool = False,
    names: Sequence[str] | None = None,
    method: str = "tensor_train",
) -> FactorizedLinear:
    """TT/MPO of any order: cores (r_{k-1}, o_k, i_k, r_k) with r_0 = r_D = 1, as TT-LLM stores them (arXiv:2606.03465).

    ``ranks`` are the inner ones, one fewer than sites. Raises NetworkError on other lengths.
    """
    inputs, outputs = _sites(name, in_modes, out_modes, minimum=1)
    if len(ranks) != len(inputs) - 1:
        raise NetworkError(
            f"Linear {name!r}: expected {len(inputs) - 1} inner ranks for {len(inputs)} sites, found {len(ranks)}."
        )
    return _chain(name, inputs, outputs, (1, *ranks, 1), ring=False, dtype=dtype, bias=bias, names=names, method=method)


def tensor_ring(
    name: str,
    in_modes: Sequence[int],
    out_modes: Sequence[int],
    ranks: Sequence[int],
    *,
    dtype: str = "float32",
    bias: bool = False,
    names: Sequence[str] | None = None,
    method: str = "tensor_ring",
) -> FactorizedLinear:
    """Tensor ring: cores (r_{k-1}, o_k, i_k, r_k), the last bond closing onto the first: r_0 = r_D = ``ranks[-1]``.

    ``ranks[k]`` follows site k, one per site, at least two sites. Raises NetworkError on other lengths.
    """
    inputs, outputs = _sites(name, in_modes, out_modes, minimum=2)
    if len(ranks) != len(inputs):
        raise NetworkError(f"Linear {name!r}: expected one rank per site ({len(inputs)}), found {len(ranks)}.")
    bonds = (ranks[-1], *ranks)
    return _chain(name, inputs, outputs, bonds, ring=True, dtype=dtype, bias=bias, names=names, method=method)


def _chain(
    name: str,
    inputs: tuple[Mode, ...],
    outputs: tuple[Mode, ...],
    ranks: Sequence[int],
    *,
    ring: bool,
    dtype: str,
    bias: bool,
    names: Sequence[str] | None,
    method: str,
) -> FactorizedLinear:
    require_sizes(name, ranks=ranks)
    sites = len(inputs)
    bonds = [f"r{index}" for index in range(sites + 1)]
    if ring:
        bonds[0] = bonds[-1]
    cores = []
    for site, core in enumerate(core_names(name, sites, names)):
        (i, i_size), (o, o_size) = inputs[site], outputs[site]
        tensor = TensorRef(core, (ranks[site], o_size, i_size, ranks[site + 1]), dtype)
        cores.append(Core(tensor, (bonds[site], o, i, bonds[site + 1])))
    return single(name, Branch(inputs, outputs, tuple(cores)), dtype=dtype, bias=bias, method=method)


def _sites(
    name: str, in_modes: Sequence[int], out_modes: Sequence[int], *, minimum: int
) -> tuple[tuple[Mode, ...], tuple[Mode, ...]]:
    require_sizes(name, in_modes=in_modes, out_modes=out_modes)
    if len(in_modes) != len(out_modes) or len(in_modes) < minimum:
        raise NetworkError(
            f"Linear {name!r}: expected as many input as output modes, at least {minimum}, found {len(in_modes)} "
            f"(product {prod(in_modes)}) and {len(out_modes)} (product {prod(out_modes)})."
        )
    inputs = tuple((f"i{site}", size) for site, size in enumerate(in_modes, 1))
    outputs = tuple((f"o{site}", size) for site, size in enumerate(out_modes, 1))
    return inputs, outputs
