"""The bar: what error passes, and where it comes from."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from mixt_export.verification.metrics import LogitsComparison

#: float32 against float32: the order of additions differs, nothing else.
FLOAT32_TOLERANCE = 1e-5
#: The exported model may make up to twice the error that PyTorch makes at the same dtype, plus this.
DTYPE_FACTOR, DTYPE_FLOOR = 2.0, 1e-4
#: Where PyTorch itself overflows at the dtype there is no cost to compare with.
OVERFLOW_TOLERANCE = 1e-2
LOW_PRECISION_COSINE = 0.999
#: Where the bar is wider (bfloat16, mostly), seeing no top token change in a few positions does not say that none does.
WIDE = 1e-2


@dataclass(frozen=True)
class DtypeCost:
    """What PyTorch at the target dtype loses against PyTorch float32 on the same tokens."""

    dtype: str
    positions: int
    rel_l2: float
    cosine: float
    kl: float
    flips: int
    nonfinite: int
    layers: list[float] = field(default_factory=list)
    far: float = 0.0
    """The relative L2 of logits at far positions, behind a long cache."""


@dataclass(frozen=True)
class Gate:
    """``tolerance``: relative L2 of logits; ``far``: the same at far positions, if more.

    ``layers``: the same for each block's output, to name who diverges.
    """

    tolerance: float
    layers: list[float]
    far: float = 0.0
    cosine: float = 0.0
    flip_rate: float = 0.0
    origin: str = ""
    cost: DtypeCost | None = None

    @property
    def floor(self) -> float:
        """Share of its threshold that rounding alone may take: nearly half of a measured one, a tenth of the usual."""
        return 0.1 if self.cost is None else 0.4

    def judge(self, comparison: LogitsComparison) -> str:
        """Why ``comparison`` fails, or an empty string when it passes."""
        if comparison.nonfinite:
            return f"{comparison.nonfinite} of {comparison.positions} positions have NaN or Inf logits"
        if not comparison.rel_l2 <= self.tolerance:
            return f"relative L2 of logits {comparison.rel_l2:.1e} exceeds the tolerance {self.tolerance:.1e}"
        if comparison.flips > math.ceil(self.flip_rate * comparison.positions):
            return f"the top token differs at {comparison.flips} of {comparison.positions} positions beyond a tie"
        if comparison.cosine < self.cosine:
            return f"cosine {comparison.cosine:.6f} is below {self.cosine}"
        return ""


def float32_gate(layers: int, tolerance: float | None) -> Gate:
    """The gate of a float32 export."""
    bar = tolerance or FLOAT32_TOLERANCE
    return Gate(bar, [bar] * layers, origin="--tolerance" if tolerance else "float32")


def rounding_gate(cost: DtypeCost) -> Gate:
    """The gate of a float32 export of a model that amplifies rounding itself (a badly compressed one does).

    ``cost`` is PyTorch float32 against PyTorch float64. The reference is off by that much, the exported model may be
    off by ``DTYPE_FACTOR`` times as much, and they may err in opposite directions. A model that does not amplify
    keeps the usual bar.
    """
    factor = 1 + DTYPE_FACTOR
    bar, far, *layers = (
        max(FLOAT32_TOLERANCE, factor * error) if math.isfinite(error) else FLOAT32_TOLERANCE
        for error in (cost.rel_l2, cost.far, *cost.layers)
    )
    origin = (
        f"{factor:g} x what rounding to float32 costs PyTorch against float64" if bar > FLOAT32_TOLERANCE else "float32"
    )
    return Gate(bar, layers, far, origin=origin, cost=cost)


def dtype_gate(cost: DtypeCost, tolerance: float | None) -> Gate:
    """The gate of an export at a lower precision: judged by what the dtype itself costs."""
    overflow = not math.isfinite(cost.rel_l2)
    bar = tolerance or (OVERFLOW_TOLERANCE if overflow else allowed(cost.rel_l2))
    layers = [bar if not math.isfinite(error) else allowed(error) for error in cost.layers]
    flips = max(cost.flips, 1) if bar > WIDE else cost.flips
    # 1 - cosine is half the square of the relative error, as far as that is perpendicular
    cosine = 1 - DTYPE_FACTOR**2 * (1 - cost.cosine) if math.isfinite(cost.cosine) else LOW_PRECISION_COSINE
    origin = f"{DTYPE_FACTOR:g} x what PyTorch loses at {cost.dtype}, plus {DTYPE_FLOOR:g}"
    if overflow:
        origin = f"PyTorch itself overflows at {cost.dtype}; fixed tolerance"
    return Gate(
        bar,
        layers,
        0.0 if tolerance or not math.isfinite(cost.far) else allowed(cost.far),
        cosine=min(LOW_PRECISION_COSINE, cosine),
        flip_rate=flips / max(cost.positions, 1),
        origin="--tolerance" if tolerance else origin,
        cost=cost,
    )


def allowed(error: float) -> float:
    """The error an exported model may make where PyTorch at the same dtype makes ``error``."""
    return DTYPE_FACTOR * error + DTYPE_FLOOR
