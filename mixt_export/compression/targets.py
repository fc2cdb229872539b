"""Which linears are compressed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from mixt_export.errors import UsageError


def is_expert(name: str) -> bool:
    """Whether the linear ``name`` (a module path) belongs to one expert of a mixture of experts."""
    return ".experts." in name


def select(linears: Iterable[str], include: Sequence[str], exclude: Sequence[str]) -> list[str]:
    """Names of ``linears`` that some ``include`` matches (all, when none is given) and no ``exclude`` does.

    Patterns are regular expressions searched in the module path. Raises UsageError when one does not compile, when an
    include matches nothing, or when nothing is left.
    """
    names = list(linears)
    wanted, unwanted = _compile(include, "--include"), _compile(exclude, "--exclude")
    for pattern in wanted:
        if not any(pattern.search(name) for name in names):
            raise UsageError(
                f"--include {pattern.pattern!r} matches none of the {len(names)} linears of the decoder blocks "
                f"(such as {names[0]}); embeddings and the output head are never compressed."
                if names
                else "the model has no linears in its decoder blocks."
            )
    chosen = [
        name
        for name in names
        if (not wanted or any(pattern.search(name) for pattern in wanted))
        and not any(pattern.search(name) for pattern in unwanted)
    ]
    if not chosen:
        raise UsageError("--include and --exclude leave no linear to compress; loosen them.")
    return chosen


def _compile(patterns: Sequence[str], option: str) -> list[re.Pattern[str]]:
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern))
        except re.error as error:
            raise UsageError(f"{option} {pattern!r} is not a regular expression ({error}).") from error
    return compiled
