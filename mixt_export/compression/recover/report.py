"""What recover did, in data: returned, stored in the checkpoint and written beside it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from mixt_export.compression.report import TextReport


@dataclass(frozen=True)
class Score:
    """One text through the three models: perplexities, and mean KL(teacher ‖ student) in nats, full vocabulary.

    ``tokens``: predicted ones. ``role``: "held out" (the end of a training text) or "evaluation".
    """

    text: str
    role: str
    tokens: int
    teacher: float
    before: float
    after: float
    kl_before: float
    kl_after: float


@dataclass(frozen=True)
class Check:
    """Held-out divergence (nats, full vocabulary) after ``step`` steps; mean training loss since the check before."""

    step: int
    held_out_kl: float
    training_loss: float | None


@dataclass(frozen=True)
class RecoverReport:
    """The whole run. ``best_step``: the one whose parameters were kept; ``trained``: parameters that moved.

    ``tokens``: trained on, repetitions counted, of ``distinct_tokens``. ``cpu_seconds``: of this process per stage, of
    the last run alone where a run was resumed.
    """

    teacher: str
    blocks: tuple[int, ...]
    linears: int
    trained: int
    steps: int
    best_step: int
    tokens: int
    distinct_tokens: int
    seed: int
    settings: dict[str, Any]
    texts: tuple[TextReport, ...]
    checks: tuple[Check, ...]
    scores: tuple[Score, ...]
    cpu_seconds: dict[str, float] = field(default_factory=dict)
    peak_rss_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)
