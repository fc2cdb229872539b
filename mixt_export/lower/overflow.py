"""From what a calibration scan saw to the float32 islands that keep a float16 graph finite. No torch here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mixt_export.errors import UnsupportedError
from mixt_export.families.wiring import Block, Decoder
from mixt_export.lower.precision import HEAD, Islands

FLOAT16_MAX = 65504.0
#: Calibration does not see every text: what comes within this factor of the limit is treated as overflowing.
HEADROOM = 2.0
#: A scaled linear is brought this far below the limit.
_TARGET = FLOAT16_MAX / 8
#: 2^-k on an input whose entries are near 1 leaves float16's normal numbers beyond this.
_LARGEST_SHIFT = 12


@dataclass(frozen=True)
class Extremes:
    """Largest |x| that calibration saw, per tensor; infinite where the reference itself was not finite.

    ``inputs``, ``outputs``: of linears by name (the tied head is "lm_head"); ``inner``: between the factors of a linear
    and before its scale; ``residual``: of the stream after each block, the embedding first; ``scores``: of attention
    before the softmax, per block; ``keys``, ``values``: as cached, per block. ``tokens``: how many were run.
    """

    tokens: int
    inputs: Mapping[str, float] = field(default_factory=dict)
    outputs: Mapping[str, float] = field(default_factory=dict)
    inner: Mapping[str, float] = field(default_factory=dict)
    residual: tuple[float, ...] = ()
    scores: tuple[float, ...] = ()
    keys: tuple[float, ...] = ()
    values: tuple[float, ...] = ()

    def largest(self) -> dict[str, dict[str, Any]]:
        """Per kind of tensor: the largest |x| and where it was, and its share of float16's largest number."""
        kinds: dict[str, Mapping[Any, float]] = {
            "linear input": self.inputs, "linear output": self.outputs, "between factors": self.inner,
            **{
                kind: dict(enumerate(series))
                for kind, series in (
                    ("residual stream", self.residual), ("attention scores", self.scores), ("keys", self.keys),
                    ("values", self.values),
                )
            },
        }  # fmt: skip
        found = {}
        for kind, series in kinds.items():
            if series:
                where = max(series, key=lambda name: series[name])
                found[kind] = {
                    "max": series[where] if math.isfinite(series[where]) else None,
                    "where": str(where),
                    "of_float16_max": round(series[where] / FLOAT16_MAX, 6) if math.isfinite(series[where]) else None,
                }
        return found


def islands_for(extremes: Extremes, decoder: Decoder) -> Islands:
    """The smallest set of islands that keeps what was seen, times ``HEADROOM``, within float16.

    Raises UnsupportedError where none can: keys or values beyond the cache's dtype, a linear beyond any scale, or a
    reference that is not finite itself.
    """
    _refuse_hopeless(extremes)
    shifts = {}
    for name in (*(linear.name for block in decoder.blocks for linear in block.linears), HEAD):
        peak = max(series.get(name, 0.0) for series in (extremes.inputs, extremes.outputs, extremes.inner))
        if _overflows(peak):
            shifts[name] = _shift(name, peak)
    writers = {linear.name for block in decoder.blocks for linear in block.writers}
    residual = any(map(_overflows, extremes.residual)) or bool(writers & shifts.keys())
    attention = {index for index, peak in enumerate(extremes.scores) if _overflows(peak)}
    plain = (block for block in decoder.blocks if block.attention.q_norm is None)
    attention |= {block.index for block in plain if _wide_query(block, extremes)}
    return Islands(residual, frozenset(attention), shifts)


def _wide_query(block: Block, extremes: Extremes) -> bool:
    return _overflows(extremes.outputs.get(block.attention.query.name, 0.0))


def _overflows(peak: float) -> bool:
    return peak * HEADROOM > FLOAT16_MAX


def _shift(name: str, peak: float) -> int:
    shift = math.ceil(math.log2(peak / _TARGET))
    if shift > _LARGEST_SHIFT:
        raise UnsupportedError(
            f"{name}: calibration saw |x| up to {peak:.3g}, too far beyond float16's {FLOAT16_MAX:g} for a scale "
            "to rescue it; export with --dtype bf16 or fp32."
        )
    return shift


def _refuse_hopeless(extremes: Extremes) -> None:
    named: dict[str, Mapping[Any, float]] = {
        "inputs of": extremes.inputs, "outputs of": extremes.outputs, "values between the factors of": extremes.inner,
        "the residual stream after block": dict(enumerate(extremes.residual)),
        "attention scores of block": dict(enumerate(extremes.scores)),
    }  # fmt: skip
    for what, series in named.items():
        for name, peak in series.items():
            if not math.isfinite(peak):
                raise UnsupportedError(
                    f"{what} {name}: not finite in float32 already; the model itself is broken, export cannot mend it."
                )
    for what, peaks in (("keys", extremes.keys), ("values", extremes.values)):
        for index, peak in enumerate(peaks):
            if not math.isfinite(peak) or _overflows(peak):
                raise UnsupportedError(
                    f"block {index}: cached {what} reach |x| = {peak:.3g}, which a float16 cache (up to "
                    f"{FLOAT16_MAX:g}) cannot hold safely; export with --dtype bf16 or fp32."
                )
