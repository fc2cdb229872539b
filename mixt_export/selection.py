"""Which blocks, and which number for which linear: what verbs share when they choose parts of a model by text."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mixt_export.errors import UsageError

Sizes = tuple[int | None, list[tuple[re.Pattern[str], int]]]
"""A number for every linear (None: not given) and numbers for linears whose path a pattern matches."""

_RANGE = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?")
_COUNTED = re.compile(r"(last|first):([0-9]{1,9})")
_NUMBER = re.compile(r"[0-9]{1,9}")


def fewer(text: str, count: int) -> bool:
    """Whether a model of ``count`` blocks has fewer than ``text``, ``last:N`` or ``first:N``, asks for."""
    counted = _COUNTED.fullmatch(text.strip())
    return counted is not None and count < int(counted.group(2))


def parse_blocks(text: str, count: int) -> tuple[int, ...]:
    """Numbers of the chosen blocks, ascending, each once: ``last:N``, ``first:N``, ``all`` or a list ``0,3,7-9``.

    ``count``: blocks of the model. Raises UsageError for other text, for numbers the model does not have, and for a
    range that runs backwards.
    """
    chosen = text.strip()
    if chosen == "all":
        return tuple(range(count))
    counted = _COUNTED.fullmatch(chosen)
    if counted is not None:
        number = int(counted.group(2))
        if not 1 <= number <= count:
            raise UsageError(
                f"--blocks {text}: the model has {count} blocks; give {counted.group(1)}:1 to "
                f"{counted.group(1)}:{count}, or all."
            )
        return tuple(range(number)) if counted.group(1) == "first" else tuple(range(count - number, count))
    found: set[int] = set()
    for item in chosen.split(","):
        match = _RANGE.fullmatch(item.strip())
        if match is None:
            raise UsageError(
                f"--blocks {text}: {item.strip()!r} is not understood; give last:N, first:N, all, or a list such as "
                "0,3,7-9."
            )
        start, end = int(match.group(1)), int(match.group(2) or match.group(1))
        if start > end:
            raise UsageError(f"--blocks {text}: the range {item.strip()} runs backwards; write {end}-{start}.")
        if end >= count:
            raise UsageError(f"--blocks {text}: the model has blocks 0 to {count - 1}; there is no block {end}.")
        found.update(range(start, end + 1))
    return tuple(sorted(found))


def parse_sizes(items: Sequence[str], option: str) -> Sizes:
    """Items ``4`` (for every linear) and ``REGEX=2`` (for linears whose module path the expression is found in).

    ``option`` names them in errors (``--n-tensors``). Raises UsageError for other text, two numbers for every linear,
    a number below 1, and an expression that does not compile.
    """
    default: int | None = None
    rules: list[tuple[re.Pattern[str], int]] = []
    for item in items:
        pattern, equals, number = item.strip().rpartition("=")
        if not _NUMBER.fullmatch(number.strip()) or int(number) < 1 or (equals and not pattern):
            raise UsageError(f"{option} {item}: give a number of at least 1, or TYPE=NUMBER such as q_proj=2.")
        if equals:
            try:
                rules.append((re.compile(pattern), int(number)))
            except re.error as error:
                raise UsageError(f"{option} {item}: {pattern!r} is not a regular expression ({error}).") from error
        elif default is None:
            default = int(number)
        else:
            raise UsageError(f"{option} is {default} and {int(number)} for every linear; give one of them.")
    return default, rules


def require_matches(sizes: Sizes, names: Sequence[str], option: str) -> None:
    """Raise UsageError for a rule of ``sizes`` that matches none of the linears ``names``."""
    for pattern, _ in sizes[1]:
        if not any(pattern.search(name) for name in names):
            raise UsageError(f"{option} {pattern.pattern}=…: matches none of the {len(names)} chosen linears.")


def size_of(name: str, sizes: Sizes) -> int | None:
    """The number that ``parse_sizes`` found for the linear ``name``: the last rule that matches, else the default."""
    default, rules = sizes
    for pattern, number in reversed(rules):
        if pattern.search(name):
            return number
    return default
