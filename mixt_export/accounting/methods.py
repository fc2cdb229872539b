"""Methods whose factors are known from sizes alone: what each makes of a linear, without weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from mixt_export.errors import UsageError
from mixt_export.families.wiring import Decoder, Linear
from mixt_export.network import FactorizedLinear, build
from mixt_export.selection import Sizes, parse_blocks, require_matches, size_of

#: N_T, and the share that low rank keeps, where nothing else is asked for; as `mixt compress` has them.
DEFAULT_TERMS = 4
DEFAULT_KEEP = 0.9

#: Far more branches than there are bonds in any feature size.
_MOST_TERMS = 32


@dataclass(frozen=True)
class Request:
    """What is replaced and how, as the options of ``mixt inspect`` say it.

    ``blocks``: text for parse_blocks; None: the method's default. ``n_tensors``: N_T for all linears and by pattern.
    ``keep``: share of the parameters that low rank keeps; None: beside MixT as many as that has, else DEFAULT_KEEP.
    """

    blocks: str | None = None
    n_tensors: Sizes = (None, [])
    bond: int = 2
    paper_padding: bool = False
    keep: float | None = None


@dataclass(frozen=True)
class Variant:
    """A model with the linears of ``factors`` replaced; none is for the dense model."""

    name: str
    method: str
    factors: Mapping[str, FactorizedLinear]


def variants(decoder: Decoder, method: str | None, request: Request) -> list[Variant]:
    """The dense model, then what ``method`` makes of it, then what is worth comparing with it.

    Raises UsageError for an unknown method, blocks the model does not have, and sizes that do not fit.
    """
    found = [Variant("dense", "dense", {})]
    if method is None:
        return found
    if method not in METHODS:
        raise UsageError(f"--method {method}: without weights only {' and '.join(METHODS)} can be counted.")
    if request.keep is not None and not 0 < request.keep <= 1:
        raise UsageError(f"--keep {request.keep}: give the share of the parameters to keep, more than 0, at most 1.")
    chosen = chosen_blocks(decoder, method, request)
    linears = [linear for index in chosen for linear in decoder.blocks[index].linears]
    return found + METHODS[method].variants(linears, request)


def chosen_blocks(decoder: Decoder, method: str, request: Request) -> tuple[int, ...]:
    """Numbers of the blocks that are replaced. Raises UsageError for blocks the model does not have."""
    return parse_blocks(request.blocks or METHODS[method].blocks, len(decoder.blocks))


def _mixt(linears: Sequence[Linear], request: Request) -> list[Variant]:
    """As asked; beside the padded form the exact one where it exists; low rank of the size of the smaller one."""
    if request.bond < 2:
        raise UsageError(f"--bond {request.bond}: the local dimension is at least 2.")
    require_matches(request.n_tensors, [linear.name for linear in linears], "--n-tensors")
    padded = request.paper_padding
    asked = Variant("mixt, padded" if padded else "mixt", "mixt", _tensor_mixtures(linears, request, padded))
    found = [asked]
    if padded and all(_fits(linear, _terms(linear, request), request.bond, False) for linear in linears):
        found.append(Variant("mixt, exact", "mixt", _tensor_mixtures(linears, request, False)))
    smallest = found[-1].factors
    size = {linear.name: sum(core.size for core in smallest[linear.name].core_tensors()) for linear in linears}
    return [*found, _low_rank(linears, request, size)]


def _svd(linears: Sequence[Linear], request: Request) -> list[Variant]:
    keep = DEFAULT_KEEP if request.keep is None else request.keep
    return [_low_rank(linears, replace(request, keep=keep), {})]


@dataclass(frozen=True)
class Method:
    """``variants``: what linears become, and what to compare with. ``blocks``: those replaced by default."""

    variants: Callable[[Sequence[Linear], Request], list[Variant]]
    blocks: str


#: One line here makes a method known.
METHODS = {"mixt": Method(_mixt, "last:4"), "svd": Method(_svd, "all")}


def _tensor_mixtures(linears: Sequence[Linear], request: Request, padded: bool) -> dict[str, FactorizedLinear]:
    made = {}
    for linear in linears:
        terms = _terms(linear, request)
        if not _fits(linear, terms, request.bond, padded):
            raise UsageError(_misfit(linear, linears, request, padded))
        made[linear.name] = build.mixt(
            linear.name,
            linear.in_features,
            linear.out_features,
            terms,
            bond=request.bond,
            paper_padding=padded,
            bias=linear.bias,
        )
    return made


def _terms(linear: Linear, request: Request) -> int:
    terms = size_of(linear.name, request.n_tensors) or DEFAULT_TERMS
    if not 2 <= terms <= _MOST_TERMS:
        raise UsageError(
            f"--n-tensors {terms}: MixT has 2 to {_MOST_TERMS} tensors for a linear such as {linear.name}."
        )
    return terms


def _fits(linear: Linear, terms: int, bond: int, padded: bool) -> bool:
    """Whether S = bond^(terms-1) divides both features, or with padding their next powers of ``bond``."""
    spectators: int = bond ** (terms - 1)
    if padded:  # a power of bond divides the next power above the features unless it is larger itself
        return spectators < bond * min(linear.in_features, linear.out_features)
    return linear.in_features % spectators == 0 and linear.out_features % spectators == 0


def _misfit(linear: Linear, linears: Sequence[Linear], request: Request, padded: bool) -> str:
    """Why N_T does not fit ``linear``, and what fits all ``linears``."""
    terms, bond = _terms(linear, request), request.bond
    fitting = [count for count in range(2, _MOST_TERMS) if all(_fits(other, count, bond, padded) for other in linears)]
    remedies = []
    if fitting:
        remedies.append(f"{f'N_T from 2 to {fitting[-1]} fits' if len(fitting) > 1 else 'N_T = 2 fits'} all")
    if not padded and all(_fits(other, _terms(other, request), bond, True) for other in linears):
        remedies.append("--paper-padding pads the features")
    what = "fit into the padded features" if padded else "divide the features"
    return (
        f"--n-tensors {terms}: {bond}^{terms - 1} = {bond ** (terms - 1)} does not {what} of {linear.name} "
        f"({linear.in_features} → {linear.out_features}); {', or '.join(remedies) or 'take a smaller --bond'}."
    )


def _low_rank(linears: Sequence[Linear], request: Request, size: Mapping[str, int]) -> Variant:
    """Rank = int(parameters / (in + out)), at least 1; a linear of which no rank is smaller stays dense."""
    made = {}
    for linear in linears:
        dense, unit = linear.in_features * linear.out_features, linear.in_features + linear.out_features
        target = request.keep * dense if request.keep is not None else size[linear.name]
        rank = max(1, int(target / unit))
        if rank * unit < dense:
            made[linear.name] = build.low_rank(
                linear.name, linear.in_features, linear.out_features, rank, bias=linear.bias
            )
    share = "equal size" if request.keep is None else f"{request.keep:g} kept"
    return Variant(f"low rank, {share}", "svd", made)
