"""What compress did, in data: returned, stored in the checkpoint and written beside it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class LayerReport:
    """One targeted linear. ``rank`` None: it stays dense.

    ``loss_tail``: the objective's estimate of what was thrown away (loss increase in nats per token for gfw-svd, mean
    squared output error otherwise; None where the objective of a dense layer has no value). ``output_error``:
    ||(W - W') x||² / ||W x||² over the calibration tokens the replacement sees.
    """

    name: str
    out_features: int
    in_features: int
    method: str
    rank: int | None
    params: int
    kept: float
    loss_tail: float
    output_error: float


@dataclass(frozen=True)
class TextReport:
    """One calibration text: where from, its digest, how many windows were taken of how many tokens it has."""

    source: str
    sha256: str
    tokens: int
    windows: int


@dataclass(frozen=True)
class CompressionReport:
    """The whole run. ``keep_achieved`` counts the targeted linears; parameters are counted once where tied."""

    method: str
    objective: str
    ranks: str
    keep_asked: float
    keep_achieved: float
    linears_params_before: int
    linears_params_after: int
    model_params_before: int
    model_params_after: int
    seed: int
    settings: dict[str, Any]
    layers: tuple[LayerReport, ...]
    texts: tuple[TextReport, ...]
    seconds: dict[str, float] = field(default_factory=dict)
    peak_rss_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)
