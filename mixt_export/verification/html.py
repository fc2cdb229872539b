"""report.html: one file, no scripts, nothing loaded from elsewhere; every value is escaped by the template engine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mixt_export.verification.report import LayerError, Report

_TEMPLATE = Path(__file__).parent / "report.html.j2"
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 720.0, 220.0, 56.0, 24.0


@dataclass(frozen=True)
class Bar:
    """One block in the chart, in SVG units."""

    x: float
    y: float
    width: float
    height: float
    threshold_y: float
    diverges: bool
    label: str


@dataclass(frozen=True)
class Chart:
    """Per-layer error on a logarithmic axis. ``ticks``: (y, label)."""

    width: float
    height: float
    left: float
    bars: list[Bar]
    ticks: list[tuple[float, str]]


def render(report: Report) -> str:
    """The whole page."""
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(size=size, number=number)
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(report=report, chart=layer_chart(report.layers))


def size(nbytes: int) -> str:
    """Bytes as MB with one digit (1 MB = 10^6 bytes), or kB below a tenth of that."""
    return f"{nbytes / 1e6:,.1f} MB" if nbytes >= 1e5 else f"{nbytes / 1e3:,.1f} kB"


def number(value: object) -> str:
    """A metric for people: counts as they are, fractions with three digits."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else str(value)
    if isinstance(value, int) or not math.isfinite(value):
        return str(value)
    if 0.999 < value < 1.0:  # rounded down: what is not quite 1 must not read as 1
        return f"{math.floor(value * 1e6) / 1e6:.6f}"
    return f"{value:.4f}".rstrip("0").rstrip(".") if 1e-3 <= abs(value) < 1e6 or value == 0 else f"{value:.2e}"


def layer_chart(layers: list[LayerError]) -> Chart | None:
    """Bars from the smallest to the largest decade that occurs; None without layers."""
    values = [value for layer in layers for value in (layer.rel_l2, layer.threshold) if 0 < value < math.inf]
    if not values:
        return None
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)) - 1e-9)
    high = max(high, low + 1)
    floor = _HEIGHT - _BOTTOM

    def place(value: float) -> float:
        if value <= 0:
            return floor
        position = (math.log10(min(value, 10.0**high)) - low) / (high - low) if value < math.inf else 1.0
        return floor - max(position, 0.0) * (floor - 8)

    step = (_WIDTH - _LEFT) / len(layers)
    bars = [
        Bar(
            x=_LEFT + index * step + 0.1 * step,
            y=place(layer.rel_l2),
            width=0.8 * step,
            height=floor - place(layer.rel_l2),
            threshold_y=place(layer.threshold),
            diverges=not layer.rel_l2 <= layer.threshold,
            label=f"{layer.name}: {layer.rel_l2:.2e} (threshold {layer.threshold:.1e})",
        )
        for index, layer in enumerate(layers)
    ]
    ticks = [(place(10.0**power), f"1e{power}") for power in range(low, high + 1)]
    return Chart(_WIDTH, _HEIGHT, _LEFT, bars, ticks)
