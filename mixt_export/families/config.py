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


#: transformers' names of activations -> keys of lower.mlp.activations.ACTIVATIONS.
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def activation(config: Config, key: str, default: str) -> str:
    """Activation as the wiring names it. Raises UnsupportedError for one without a rule here."""
    name = config.get(key)
    if name is None:
        name = default
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise UnsupportedError(f"config.json: {key} = {name!r} is not supported; supported are {known}.")
    return _ACTIVATIONS[name]


def optional_number(config: Config, key: str, default: float | None = None) -> float | None:
    """A positive finite number, or None where the key is null; ``default`` where it is missing."""
    return None if key in config and config[key] is None else number(config, key) if key in config else default
