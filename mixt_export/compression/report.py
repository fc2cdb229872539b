"""What compress did, in data: returned, stored in the checkpoint and written beside it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from mixt_export.compression.controls import Controls, TextScores


@dataclass(frozen=True)
class LayerReport:
    """One targeted linear. ``rank`` of low rank factors, ``terms`` N_T of MixT, ``ranks`` of Tucker and
    of the bonds of a tensor train; all None: dense.

    ``output_error``: ||(W - W') x||² / ||W x||² over the calibration tokens the replacement sees; for MixT the mean of
    the tokens' own ratios, before refinement. ``loss_tail``: the objective's estimate of what was thrown away (loss
    increase in nats per token for gfw-svd, mean squared output error for other low rank methods, the measured change
    of the loss for LASER). Methods that read no text give ||W - W'||² / ||W||² as ``output_error``. Parameters that
    several linears share are divided among them, in proportion to their dense sizes. Of factors that are stored in
    parts (--store) ``params`` counts numbers of 16 bits, ``stored_bytes`` what the parts take, and ``stored_error`` is
    ||W' - Ŵ'|| / ||W'|| of the product before and after; None: stored as they are.
    """

    name: str
    out_features: int
    in_features: int
    method: str
    params: int
    kept: float
    output_error: float
    rank: int | None = None
    terms: int | None = None
    loss_tail: float | None = None
    ranks: tuple[int, ...] | None = None
    stored_bytes: int | None = None
    stored_error: float | None = None


@dataclass(frozen=True)
class TextReport:
    """One calibration text: where from, its digest, how many windows were taken of how many tokens it has."""

    source: str
    sha256: str
    tokens: int
    windows: int


@dataclass(frozen=True)
class BlockReport:
    """Refinement of one block: its loss (per-token relative squared error of the output) before and after ``steps``."""

    index: int
    steps: int
    loss_before: float
    loss_after: float


@dataclass(frozen=True)
class SearchReport:
    """LASER's search: ``trials`` it made, whether it ``finished`` in its time, and the losses in nats per token.

    ``before``, ``after``: on the windows that it chose by; ``check_before``, ``check_after``: on as many others.
    """

    trials: int
    finished: bool
    before: float
    after: float
    check_before: float
    check_after: float


@dataclass(frozen=True)
class CompressionReport:
    """The whole run. ``recipe``: the options of the method's family as they were resolved.

    ``keep_achieved`` counts the targeted linears; parameters are counted once where tied. ``controls``: None where the
    method has none or they were not asked for. ``evaluation``: scores of the original ("dense") and the result
    ("compressed") on held-out texts; ``cached``: what the statistics cache had. ``notes``:
    sentences the user should read.
    """

    method: str
    recipe: dict[str, Any]
    keep_achieved: float
    linears_params_before: int
    linears_params_after: int
    model_params_before: int
    model_params_after: int
    seed: int
    settings: dict[str, Any]
    layers: tuple[LayerReport, ...]
    texts: tuple[TextReport, ...]
    blocks: tuple[BlockReport, ...] = ()
    controls: Controls | None = None
    search: SearchReport | None = None
    notes: tuple[str, ...] = ()
    evaluation: tuple[TextScores, ...] = ()
    cached: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    peak_rss_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)
