"""How builders name the tensors of a linear, and the parts every builder shares."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mixt_export.errors import NetworkError
from mixt_export.network.ir import Branch, FactorizedLinear, TensorRef


def core_names(linear: str, cores: int, names: Sequence[str] | None, branch: int | None = None) -> tuple[str, ...]:
    """Names of a branch's cores: ``<linear>.core{c}``, with several branches ``<linear>.branch{b}.core{c}``.

    ``names`` replaces them, for tensors that linears share. Raises NetworkError when it has another length.
    """
    if names is None:
        stem = linear if branch is None else f"{linear}.branch{branch}"
        return tuple(f"{stem}.core{core}" for core in range(cores))
    if len(names) != cores:
        raise NetworkError(f"Linear {linear!r}: expected {cores} core names, found {len(names)}.")
    return tuple(names)


def bias_of(linear: str, out_features: int, dtype: str, wanted: bool) -> TensorRef | None:
    """``<linear>.bias`` (out_features,) when ``wanted``."""
    return TensorRef(f"{linear}.bias", (out_features,), dtype) if wanted else None


def require_sizes(linear: str, **sizes: int | Sequence[int]) -> None:
    """Raise NetworkError naming the linear and the argument unless every size is an integer of at least 1."""
    for argument, value in sizes.items():
        for size in _flat(value):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise NetworkError(f"Linear {linear!r}: expected {argument} of at least 1, found {size!r}.")


def single(
    linear: str, branch: Branch, *, dtype: str, bias: bool, method: str, features: tuple[int, int] | None = None
) -> FactorizedLinear:
    """A linear of one branch; ``features`` (in, out) default to the products of its modes."""
    in_features, out_features = features or (branch.in_size, branch.out_size)
    return FactorizedLinear(
        linear, in_features, out_features, (branch,), bias_of(linear, out_features, dtype, bias), method
    )


def _flat(value: int | Sequence[int]) -> Iterator[int]:
    if isinstance(value, Sequence):
        yield from value
    else:
        yield value
