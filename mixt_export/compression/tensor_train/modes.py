"""How features are split into the modes of a tensor train: balanced, from prime factors, or given."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise
from math import prod

from mixt_export.errors import UsageError

Modes = tuple[tuple[int, ...], tuple[int, ...]]
"""Input and output modes, as many of each: one pair per core."""

MIN_CORES, MAX_CORES = 2, 12
_NAMED = ("balanced", "prime")
_GIVEN = re.compile(r"([0-9]{1,9}(?:x[0-9]{1,9})*):([0-9]{1,9}(?:x[0-9]{1,9})*)")


@lru_cache(maxsize=4096)
def balanced(features: int, cores: int) -> tuple[int, ...]:
    """``features`` as a product of ``cores`` factors whose sum is least (so they are as equal as they can be), sorted.

    4096 in 3: 16 · 16 · 16; 576 in 3: 8 · 8 · 9. Where there are too few prime factors, ones come first.
    """
    if cores == 1:
        return (features,)
    best: tuple[int, ...] = ()
    for factor in _divisors(features):
        if factor**cores > features:
            break  # the smallest mode is no larger than the others
        found = tuple(sorted((factor, *balanced(features // factor, cores - 1))))
        if not best or sum(found) < sum(best):
            best = found
    return best


def prime(features: int, cores: int) -> tuple[int, ...]:
    """The prime factors of ``features`` dealt to ``cores`` modes, sorted (TT-LLM, arXiv:2606.03465).

    The largest prime first, each to the mode that is smallest by then: 4096 in 12 is 2 twelve times, 11008 in 12 is
    1 · 1 · 1 · 2 (eight times) · 43.
    """
    found = [1] * cores
    for factor in reversed(_primes(features)):
        found[found.index(min(found))] *= factor
    return tuple(sorted(found))


def modes_of(asked: Sequence[str], names: Sequence[str], shapes: Sequence[tuple[int, int]], cores: int) -> list[Modes]:
    """Modes of the linears ``names`` of ``shapes`` (out, in).

    ``asked``: items ``balanced``, ``prime`` or ``8x8x9:8x8x9`` (input:output) for every linear, or ``REGEX=…`` for
    those whose path the expression is found in; the last that matches counts, without any it is balanced in ``cores``.
    Raises UsageError for other text, a number of cores or modes that cannot be, modes whose product is not the
    features, and an expression that matches nothing.
    """
    if not MIN_CORES <= cores <= MAX_CORES:
        raise UsageError(f"--cores {cores}: a tensor train has {MIN_CORES} to {MAX_CORES} cores.")
    rules = [_rule(item) for item in asked]
    for item, (pattern, _) in zip(asked, rules, strict=True):
        if pattern is not None and not any(pattern.search(name) for name in names):
            raise UsageError(f"--modes {item}: matches none of the {len(names)} chosen linears.")
    if sum(pattern is None for pattern, _ in rules) > 1:
        raise UsageError(f"--modes {', '.join(asked)}: two of them are for every linear; give one of them.")
    rules.sort(key=lambda rule: rule[0] is not None)
    found = []
    for name, shape in zip(names, shapes, strict=True):
        chosen = [what for pattern, what in rules if pattern is None or pattern.search(name)]
        found.append(_resolved(name, shape, chosen[-1] if chosen else "balanced", cores))
    return found


def largest_ranks(modes: Modes) -> tuple[int, ...]:
    """The bonds that reproduce any matrix of these modes: the smaller of the sizes on either side of each."""
    sizes = [inside * outside for inside, outside in zip(*modes, strict=True)]
    return tuple(min(prod(sizes[:site]), prod(sizes[site:])) for site in range(1, len(sizes)))


def capped(modes: Modes, rank: int) -> tuple[int, ...]:
    """``rank`` at every bond, less where a bond cannot be that large."""
    return tuple(min(rank, limit) for limit in largest_ranks(modes))


def parameters(modes: Modes, ranks: Sequence[int]) -> int:
    """Numbers in the cores (r_{k-1}, o_k, i_k, r_k) with r_0 = r_D = 1."""
    bonds = pairwise((1, *ranks, 1))
    return sum(left * inside * outside * right for (left, right), inside, outside in zip(bonds, *modes, strict=True))


def _rule(item: str) -> tuple[re.Pattern[str] | None, str | Modes]:
    pattern, equals, what = item.strip().rpartition("=")
    given = _GIVEN.fullmatch(what.strip())
    chosen: str | Modes = what.strip()
    if given is not None:
        inputs, outputs = (tuple(int(size) for size in side.split("x")) for side in given.groups())
        if len(inputs) != len(outputs):
            raise UsageError(
                f"--modes {item}: {len(inputs)} input modes and {len(outputs)} output modes; give one pair per core "
                "(1 where a side has nothing to split)."
            )
        if not MIN_CORES <= len(inputs) <= MAX_CORES or min(*inputs, *outputs) < 1:
            raise UsageError(f"--modes {item}: give {MIN_CORES} to {MAX_CORES} modes of at least 1 on each side.")
        chosen = (inputs, outputs)
    elif what.strip() not in _NAMED or (equals and not pattern):
        raise UsageError(
            f"--modes {item}: give balanced, prime, or input and output modes such as 8x8x9:8x12x16, for some linears "
            "as REGEX=8x8x9:8x12x16."
        )
    if not equals:
        return None, chosen
    try:
        return re.compile(pattern), chosen
    except re.error as error:
        raise UsageError(f"--modes {item}: {pattern!r} is not a regular expression ({error}).") from error


def _resolved(name: str, shape: tuple[int, int], chosen: str | Modes, cores: int) -> Modes:
    out_features, in_features = shape
    if isinstance(chosen, str):
        split = balanced if chosen == "balanced" else prime
        return split(in_features, cores), split(out_features, cores)
    for side, modes, features in (("input", chosen[0], in_features), ("output", chosen[1], out_features)):
        if prod(modes) != features:
            raise UsageError(
                f"--modes: the {side} modes {'x'.join(map(str, modes))} multiply up to {prod(modes)}, but {name} has "
                f"{features} {side} features; give REGEX=… for linears of other sizes."
            )
    return chosen


def _divisors(number: int) -> Iterable[int]:
    small = [factor for factor in range(1, int(number**0.5) + 1) if number % factor == 0]
    return [*small, *(number // factor for factor in reversed(small) if factor * factor != number)]


def _primes(number: int) -> list[int]:
    found, factor = [], 2
    while factor * factor <= number:
        while number % factor == 0:
            found.append(factor)
            number //= factor
        factor += 1
    return found + ([number] if number > 1 else [])
