"""Ranks that the user gives in a JSON file."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mixt_export.compression.allocation.candidates import Candidate, Ranks
from mixt_export.errors import UsageError


def from_file(path: Path, candidates: Sequence[Candidate]) -> Ranks:
    """Ranks from a JSON object {name or regular expression: rank or "dense"}; the first key that matches counts.

    Raises UsageError when the file is not that, a rank does not fit, a linear is matched by no key or a key by no
    linear.
    """
    table = _read_table(path)
    used: set[str] = set()
    ranks: Ranks = {}
    for candidate in candidates:
        key = next((key for key in table if key == candidate.name or re.fullmatch(key, candidate.name)), None)
        if key is None:
            raise UsageError(f"{path}: no entry matches the linear {candidate.name}; add one or --exclude the linear.")
        used.add(key)
        value = table[key]
        if value == "dense":
            ranks[candidate.name] = None
        elif isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= candidate.full_rank:
            ranks[candidate.name] = value
        else:
            raise UsageError(
                f'{path}: {key!r} gives {value!r} for {candidate.name}; give "dense" or a rank from 1 to '
                f"{candidate.full_rank}."
            )
    unused = [key for key in table if key not in used]
    if unused:
        raise UsageError(f"{path}: {unused[0]!r} matches none of the targeted linears; remove or correct it.")
    return ranks


def _read_table(path: Path) -> dict[str, Any]:
    from mixt_export.compression.allocation import ALLOCATIONS

    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        known = ", ".join(ALLOCATIONS)
        raise UsageError(f"{path}: no such file; --ranks takes auto, {known} or the path of a JSON file.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: cannot be read as JSON ({error}).") from error
    if not isinstance(table, dict) or not table:
        raise UsageError(f"{path}: must hold a JSON object that maps linear names to ranks.")
    for key in table:
        try:
            re.compile(key)
        except re.error as error:
            raise UsageError(
                f"{path}: {key!r} is neither a linear's name nor a regular expression ({error})."
            ) from error
    return table
