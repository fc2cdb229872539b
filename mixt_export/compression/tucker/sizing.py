"""How large a Tucker core is: ranks that were asked for, or the best of those that keep a share of the parameters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from math import prod

import torch

from mixt_export.compression.allocation import TOLERANCE
from mixt_export.compression.tucker.decomposition import most
from mixt_export.compression.tucker.stacks import GatedStack, HeadStack, Ranks, SingleStack, Stack
from mixt_export.errors import UsageError

OPTION = "--tucker-ranks"

#: Name of a kind of stack in the option -> the class, and how its ranks are called.
KINDS: Mapping[str, tuple[type[Stack], str]] = {
    "heads": (HeadStack, "R1,R2,R3 (or q,s for (q·h, q, s))"),
    "gate-up": (GatedStack, "R1,R2"),
    "single": (SingleStack, "R"),
}

_ITEM = re.compile(r"(?:([a-z-]+)=)?([0-9]{1,9}(?:,[0-9]{1,9})*)")


def parse_ranks(items: Iterable[str] | Sequence[int] | str) -> dict[str, Ranks]:
    """Kind of stack -> ranks, from items ``R1,R2,R3`` (of heads) and ``KIND=R1,…``, or plain numbers of heads.

    Raises UsageError for other text and a kind given twice.
    """
    given = [items] if isinstance(items, str) else list(items)
    if given and all(isinstance(item, int) for item in given):
        given = [",".join(map(str, given))]
    found: dict[str, Ranks] = {}
    for item in map(str, given):
        match = _ITEM.fullmatch(item.strip().replace(" ", ""))
        kind = (match.group(1) or "heads") if match else ""
        ranks = tuple(int(number) for number in match.group(2).split(",")) if match else ()
        if kind not in KINDS or min(ranks) < 1:
            raise UsageError(
                f"{OPTION} {item}: give {KINDS['heads'][1]}, or KIND=RANKS with "
                f"{', '.join(f'{name}={what}' for name, (_, what) in KINDS.items())}."
            )
        if kind in found:
            raise UsageError(f"{OPTION} {item}: the ranks of {kind} are given twice; give them once.")
        found[kind] = ranks
    return found


def kind_of(stack: Stack) -> str:
    """The name of its kind in the option."""
    return next(kind for kind, (made, _) in KINDS.items() if isinstance(stack, made))


def checked(stack: Stack, ranks: Ranks) -> Ranks:
    """``ranks`` as one per axis; two of heads are (q·h, q, s), h kv heads.

    Raises UsageError for another number of ranks, one above its maximum (the axis, or the product of the other ranks
    and the copies of the core: more would be idle), and ranks that save nothing.
    """
    name = next(iter(stack.members.values()))
    if isinstance(stack, HeadStack) and len(ranks) == 2:
        ranks = (ranks[0] * stack.kv_heads, *ranks)
    text = ",".join(map(str, ranks))
    if len(ranks) != len(stack.sizes):
        raise UsageError(f"{OPTION} {text}: {kind_of(stack)} such as {name} have {KINDS[kind_of(stack)][1]}.")
    limits = most(stack.sizes, ranks, stack.copies)
    if any(rank > limit for rank, limit in zip(ranks, limits, strict=True)):
        raise UsageError(
            f"{OPTION} {text}: a rank is above its maximum, which with the other two ranks is "
            f"{','.join(map(str, limits))} for {name}."
            if len(ranks) == 3
            else f"{OPTION} {text}: a rank is above its maximum, {','.join(map(str, limits))} for {name}."
        )
    if ranks != stack.sizes and stack.parameters(ranks) >= stack.dense:
        raise UsageError(
            f"{OPTION} {text}: is {stack.parameters(ranks)} parameters for {name} and what is stacked with it, which "
            f"have {stack.dense}; take smaller ranks, or --exclude it."
        )
    return ranks


def fitting(stack: Stack, budget: float) -> list[Ranks]:
    """Ranks of at most ``budget`` parameters worth a look: for all choices of the later ones the largest first rank.

    Those within TOLERANCE of the budget where there are any. Raises UsageError when not even ranks of 1 fit.
    """
    first, *rest = stack.sizes
    found = []
    for later in product(*(range(1, size + 1) for size in rest)):
        limit = min(first, prod(later) * stack.copies)
        ranks = (_largest(stack, later, limit, budget), *later)
        limits = most(stack.sizes, ranks, stack.copies)
        if ranks[0] and all(rank <= limit for rank, limit in zip(ranks, limits, strict=True)):
            found.append(ranks)
    if not found:
        least = stack.parameters((1,) * len(stack.sizes))
        raise UsageError(
            f"--keep: {next(iter(stack.members.values()))} and what is stacked with it have at least {least} "
            f"parameters, {least / stack.dense:.4f} of {stack.dense}; keep more."
        )
    close = [ranks for ranks in found if stack.parameters(ranks) >= (1 - TOLERANCE) * budget]
    return close or found


def choose(stack: Stack, captured: torch.Tensor, keep: float) -> Ranks:
    """The ranks that capture most of the stack with ``keep`` of its parameters; ``captured``: see Bases.captured."""
    if keep >= 1.0:
        return stack.sizes
    return max(fitting(stack, keep * stack.dense), key=lambda ranks: float(captured[tuple(rank - 1 for rank in ranks)]))


def _largest(stack: Stack, later: Ranks, limit: int, budget: float) -> int:
    """The largest first rank up to ``limit`` within ``budget``; 0: none. Parameters grow with the rank, but at its end.

    A first rank as large as its axis needs no factor, and may be cheaper than one a little smaller.
    """
    if limit == stack.sizes[0] and stack.parameters((limit, *later)) <= budget:
        return limit
    low, high = 0, min(limit, stack.sizes[0] - 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if stack.parameters((middle, *later)) <= budget else (low, middle - 1)
    return low
