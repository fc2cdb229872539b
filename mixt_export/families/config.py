"""Read values from config.json strictly: a wrong type or an absurd size is an error that names the key."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mixt_export.errors import CheckpointError, UnsupportedError

Config = Mapping[str, Any]

_LARGEST = 1 << 31


def size(config: Config, key: str, default: int | None = None) -> int:
    """A positive integer below 2**31."""
    value = config.get(key)
    if value is None:
        value = default
    if value is None:
        raise CheckpointError(f"config.json: {key} is missing.")
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < _LARGEST:
        raise CheckpointError(f"config.json: {key} must be a positive integer, found {value!r}.")
    return value


def number(config: Config, key: str, default: float | None = None) -> float:
    """A positive finite number."""
    value = config.get(key)
    if value is None:
        value = default
    if value is None:
        raise CheckpointError(f"config.json: {key} is missing.")
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value <= 0:
        raise CheckpointError(f"config.json: {key} must be a positive number, found {value!r}.")
    return float(value)


def flag(config: Config, key: str, default: bool = False) -> bool:
    """A boolean."""
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise CheckpointError(f"config.json: {key} must be true or false, found {value!r}.")
    return value


def expect(config: Config, key: str, allowed: tuple[Any, ...]) -> None:
    """Refuse a variant this family does not implement; a missing key means the first allowed value."""
    value = config.get(key, allowed[0])
    if value not in allowed:
        raise UnsupportedError(f"config.json: {key} = {value!r} is not supported; supported is {allowed[0]!r}.")
