"""The outcome of one check, as a value."""

from __future__ import annotations

from dataclasses import dataclass, field

Metric = float | int | str | None


@dataclass(frozen=True)
class CheckResult:
    """``reason`` is empty when passed. ``where`` names the first diverging layer, ``part`` what in it, where known."""

    name: str
    title: str
    passed: bool
    reason: str = ""
    where: str = ""
    metrics: dict[str, Metric] = field(default_factory=dict)
    seconds: float = 0.0
    part: str = ""
