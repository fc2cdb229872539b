"""Which MixT each linear becomes: N_T by module path, and whether it fits the linear."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from mixt_export.compression.families import MixTOptions
from mixt_export.errors import NetworkError, UsageError
from mixt_export.network import FactorizedLinear, build
from mixt_export.network.limits import MAX_BRANCHES
from mixt_export.selection import parse_sizes, require_matches, size_of

#: The largest local dimension; beyond it nothing is left of a layer with two tensors.
MAX_BOND = 64


def terms_of(asked: int | Mapping[str, int] | Sequence[str], names: Iterable[str]) -> dict[str, int]:
    """N_T of every linear of ``names``, see families.MixTOptions.

    Raises UsageError for something else than numbers of at least 2, and for a rule that matches no linear.
    """
    names = list(names)
    sizes = parse_sizes(_items(asked), "--n-tensors")
    default, rules = sizes
    require_matches(sizes, names, "--n-tensors")
    for number in (default, *(number for _, number in rules)):
        if number is not None and not 2 <= number <= MAX_BRANCHES:
            raise UsageError(
                f"--n-tensors {number}: MixT is a sum of 2 to {MAX_BRANCHES} tensors; give 2 or more (the paper: 4), "
                "or --exclude linears that should stay dense."
            )
    plain = MixTOptions().n_tensors
    assert isinstance(plain, int)
    return {name: size_of(name, sizes) or plain for name in names}


def mixt_of(
    shapes: Mapping[str, tuple[int, int]],
    terms: Mapping[str, int],
    dtypes: Mapping[str, str],
    *,
    bond: int,
    paper_padding: bool,
) -> dict[str, FactorizedLinear]:
    """The IR of every linear as MixT, without bias; ``shapes`` (out, in), ``terms`` and ``dtypes`` by module path.

    Raises UsageError that says what would fit when N_T does not.
    """
    if not 2 <= bond <= MAX_BOND:
        raise UsageError(f"--bond {bond}: the local dimension is 2 (as in the paper) to {MAX_BOND}.")
    found = {}
    for name, (out_features, in_features) in shapes.items():
        count = terms[name]
        try:
            found[name] = build.mixt(
                name, in_features, out_features, count, bond=bond, paper_padding=paper_padding, dtype=dtypes[name]
            )
        except NetworkError as error:
            alike = [shapes[other] for other in shapes if terms[other] == count]
            less = next((n for n in range(count - 1, 1, -1) if _fits(alike, n, bond, paper_padding)), None)
            remedies = [f"--n-tensors {less} fits"] if less else []
            if not paper_padding and _fits(alike, count, bond, True):
                remedies.append("--paper-padding pads them")
            remedies.append("--exclude leaves the linear dense")
            padded = f" padded to powers of {bond}" if paper_padding else ""
            raise UsageError(
                f"{name}: {in_features} → {out_features} features{padded} are not divisible by {bond}^{count - 1} = "
                f"{bond ** (count - 1)}, as --n-tensors {count} with --bond {bond} needs; {', '.join(remedies)}."
            ) from error
    return found


def _items(asked: int | Mapping[str, int] | Sequence[str]) -> list[str]:
    """``asked`` as the items of the command line."""
    if isinstance(asked, int):
        return [str(asked)]
    if isinstance(asked, Mapping):
        return [f"{pattern}={number}" for pattern, number in asked.items()]
    return [asked] if isinstance(asked, str) else list(asked)


def _fits(shapes: Iterable[tuple[int, int]], terms: int, bond: int, padding: bool) -> bool:
    """Whether linears of ``shapes`` (out, in) can all be MixT of ``terms`` tensors."""
    try:
        for out_features, in_features in shapes:
            build.mixt("linear", in_features, out_features, terms, bond=bond, paper_padding=padding)
    except NetworkError:
        return False
    return True
