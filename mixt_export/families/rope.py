"""Rotary embeddings: read config.json's scaling rule, tabulate cosines and sines.

The tables follow the arithmetic of transformers' modeling_rope_utils in float32: at position p the angle
p * inv_freq carries an error of p * 2**-24, so a table computed in float64 would differ from what the checkpoint was
trained and is referenced with.
Sources: RoPE arXiv:2104.09864; position interpolation arXiv:2306.15595; YaRN arXiv:2309.00071; Llama 3.1
arXiv:2407.21783.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixt_export.errors import CheckpointError, UnsupportedError
from mixt_export.families.config import Config, number, size
from mixt_export.families.wiring import Rope

_Frequencies = tuple[NDArray[np.float32], float]
_F = np.float32


def read_rope(config: Config, head_dim: int, *, partial: bool = False, default_theta: float = 10000.0) -> Rope:
    """Rope of ``config``, in the old (rope_theta + rope_scaling) or the new (rope_parameters) spelling.

    ``partial``: the family reads partial_rotary_factor. Raises UnsupportedError for a rope_type without a rule here.
    """
    nested = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(nested, Mapping):
        raise CheckpointError("config.json: rope_scaling must be an object or null.")
    factor = nested.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if partial:
        whole = nested if "partial_rotary_factor" in nested else config
        factor = number(whole, "partial_rotary_factor", 1.0)
    elif factor != 1.0:
        raise UnsupportedError("config.json: partial_rotary_factor other than 1 is not supported.")
    rotary_dim = int(head_dim * factor)
    if not 0 < rotary_dim <= head_dim or rotary_dim % 2:
        raise CheckpointError(
            f"config.json: partial_rotary_factor {factor:g} makes {rotary_dim} of {head_dim} features rotate; it must "
            "be an even number of them."
        )
    theta = number(nested if "rope_theta" in nested else config, "rope_theta", default_theta)
    return rope_of(nested, config, rotary_dim, theta)


def rope_of(nested: Mapping[str, Any], config: Config, rotary_dim: int, theta: float) -> Rope:
    """The rope whose scaling rule ``nested`` holds; ``config`` gives the context where the rule leaves it out.

    Raises UnsupportedError for a rope_type without a rule here.
    """
    kind = nested.get("rope_type", nested.get("type", "default"))
    if kind not in RULES:
        raise UnsupportedError(
            f"config.json: rope_type {kind!r} is not supported; supported are {', '.join(sorted(RULES))}."
        )
    parameters = _PARAMETERS[kind](nested, config)
    return Rope(theta=theta, rotary_dim=rotary_dim, kind=kind, parameters=tuple(sorted(parameters.items())))


def cos_sin_tables(rope: Rope, positions: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosine and sine caches, each float32 (positions, rotary_dim / 2), attention scaling included."""
    frequencies, scale = RULES[rope.kind](rope)
    angles = np.arange(positions, dtype=np.float32)[:, None] * frequencies[None, :]
    return np.cos(angles) * _F(scale), np.sin(angles) * _F(scale)


def _base(rope: Rope) -> NDArray[np.float32]:
    # Raised in float64 and rounded once: numpy's float32 power is off by one unit in the last place now and then,
    # and at position 8192 such a unit moves the angle by 5e-4.
    exponents = np.arange(0, rope.rotary_dim, 2, dtype=np.float32) / _F(rope.rotary_dim)
    return np.power(rope.theta, exponents.astype(np.float64)).astype(np.float32)


def _default(rope: Rope) -> _Frequencies:
    return _F(1.0) / _base(rope), 1.0


def _linear(rope: Rope) -> _Frequencies:
    return _default(rope)[0] / _F(dict(rope.parameters)["factor"]), 1.0


def _llama3(rope: Rope) -> _Frequencies:
    given = dict(rope.parameters)
    low, high, factor = given["low_freq_factor"], given["high_freq_factor"], _F(given["factor"])
    context = given["original_max_position_embeddings"]
    plain = _default(rope)[0]
    wavelength = _F(2 * math.pi) / plain
    scaled = np.where(wavelength > context / low, plain / factor, plain)
    smooth = (_F(context) / wavelength - _F(low)) / _F(high - low)
    between = (1 - smooth) * scaled / factor + smooth * scaled
    medium = (wavelength >= context / high) & (wavelength <= context / low)
    return np.where(medium, between, scaled).astype(np.float32), 1.0


def _yarn(rope: Rope) -> _Frequencies:
    given = dict(rope.parameters)
    factor, dim, base = given["factor"], rope.rotary_dim, rope.theta
    context = given["original_max_position_embeddings"]

    def correction(rotations: float) -> float:
        return dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = correction(given["beta_fast"]), correction(given["beta_slow"])
    if given["truncate"]:
        low, high = float(math.floor(low)), float(math.ceil(high))
    low, high = max(low, 0.0), min(high, dim - 1.0)
    width = (high - low) or 0.001
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - _F(low)) / _F(width), 0, 1)
    keep = _F(1) - ramp
    powers = _base(rope)
    frequencies = (_F(1) / (_F(factor) * powers)) * (_F(1) - keep) + (_F(1) / powers) * keep
    return frequencies.astype(np.float32), given["attention_factor"]


def _none(_nested: Mapping[str, Any], _config: Config) -> dict[str, float]:
    return {}


def _factor(nested: Mapping[str, Any], _config: Config) -> dict[str, float]:
    return {"factor": number(nested, "factor")}


def _llama3_parameters(nested: Mapping[str, Any], config: Config) -> dict[str, float]:
    keys = ("factor", "low_freq_factor", "high_freq_factor")
    read = {key: number(nested, key) for key in keys}
    if read["high_freq_factor"] <= read["low_freq_factor"]:
        raise CheckpointError("config.json: rope_scaling: high_freq_factor must exceed low_freq_factor.")
    return read | {"original_max_position_embeddings": _original_context(nested, config)}


def _yarn_parameters(nested: Mapping[str, Any], config: Config) -> dict[str, float]:
    context = _original_context(nested, config)
    factor = number(nested, "factor", size(config, "max_position_embeddings") / context)

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    both = nested.get("mscale") and nested.get("mscale_all_dim")
    attention = mscale(number(nested, "mscale")) / mscale(number(nested, "mscale_all_dim")) if both else mscale(1.0)
    return {
        "factor": factor,
        "original_max_position_embeddings": context,
        "beta_fast": number(nested, "beta_fast", 32.0),
        "beta_slow": number(nested, "beta_slow", 1.0),
        "attention_factor": number(nested, "attention_factor", attention),
        "truncate": float(bool(nested.get("truncate", True))),
    }


def _original_context(nested: Mapping[str, Any], config: Config) -> float:
    return number(nested, "original_max_position_embeddings", size(config, "max_position_embeddings"))


#: rope_type -> inverse frequencies float32 (rotary_dim / 2,) and the factor on cosine and sine.
RULES: dict[str, Callable[[Rope], _Frequencies]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}

_PARAMETERS: dict[str, Callable[[Mapping[str, Any], Config], dict[str, float]]] = {
    "default": _none,
    "linear": _factor,
    "llama3": _llama3_parameters,
    "yarn": _yarn_parameters,
}


def turned_together(rope: Rope) -> list[tuple[int, int]]:
    """Channels of a head that ``rope`` turns together."""
    half = rope.rotary_dim // 2
    if rope.interleaved:
        return [(2 * index, 2 * index + 1) for index in range(half)]
    return [(index, index + half) for index in range(half)]
