"""Passes over a checkpoint before it is lowered: which ones an export runs, and what its manifest says of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mixt_export.checkpoints import Checkpoint
from mixt_export.errors import UsageError
from mixt_export.passes import Balance, Turn, run
from mixt_export.passes.low_rank import DetectLowRank, check_tolerance
from mixt_export.progress import SILENT, Progress
from mixt_export.staging import require_space

BALANCES = ("auto", "none", "weights", "calibrated")
#: By itself (auto) an export balances only linears of which some slice moves by 2 to this power or more.
AUTO_LEAST = 2.0


@dataclass(frozen=True)
class Rewriting:
    """``balance``: one of BALANCES. ``detect_low_rank``: singular values below this share of the largest count as 0.

    ``turn``: turn pairs of factors that become integers. Raises UsageError for anything else.
    """

    balance: str = "auto"
    detect_low_rank: float | None = None
    turn: bool = True

    def __post_init__(self) -> None:
        if self.balance not in BALANCES:
            raise UsageError(f"--balance {self.balance}: choose one of {', '.join(BALANCES)}.")
        if self.detect_low_rank is not None:
            check_tolerance(self.detect_low_rank)

    @property
    def asked(self) -> str | None:
        """The first option that was given, or None."""
        if self.detect_low_rank is not None:
            return "--detect-low-rank"
        return "--balance" if self.balance in ("weights", "calibrated") else None


@dataclass(frozen=True)
class Rewritten:
    """A checkpoint behind its passes. ``record``: pass -> what it did, empty when none changed anything."""

    checkpoint: Checkpoint
    record: Mapping[str, Any]


@contextmanager
def behind_passes(
    checkpoint: Checkpoint,
    rewriting: Rewriting,
    dtype: str,
    beside: Path,
    *,
    quantised: bool = False,
    pairs: Collection[str] = (),
    progress: Progress = SILENT,
) -> Iterator[Rewritten]:
    """``checkpoint``, which will be exported at ``dtype``, behind the passes that ``rewriting`` asks for.

    Factors that are made lie in a hidden folder ``beside`` the output while the context is open. ``quantised``:
    weights become integers afterwards, those of the linears ``pairs`` as two matrices. Raises what the passes raise,
    UsageError for a balance that does not go with quantisation.
    """
    record: dict[str, Any] = {}
    with ExitStack() as stack:
        turning = rewriting.turn and bool(pairs)
        if turning or rewriting.detect_low_rank is not None:
            parent = beside.absolute().parent
            parent.mkdir(parents=True, exist_ok=True)
            scratch = Path(stack.enter_context(TemporaryDirectory(prefix=f".{beside.name}.factors-", dir=parent)))
        if rewriting.detect_low_rank is not None:
            found = run(DetectLowRank(rewriting.detect_low_rank, scratch, progress), checkpoint)
            checkpoint = found.checkpoint
            record["detect_low_rank"] = found.record
        if turning:
            cores = [core for name in pairs for core in checkpoint.factors[name].core_tensors()]
            require_space(beside, 4 * sum(core.size for core in cores), "turning factors (--no-turn leaves them)")
            turned = run(Turn(pairs, scratch, progress), checkpoint)
            checkpoint = turned.checkpoint
            record["turn"] = turned.record
        balance = _balance(checkpoint, rewriting, dtype, quantised, progress)
        if balance is not None:
            balanced = run(balance, checkpoint)
            checkpoint = balanced.checkpoint
            record.update({"balance": balanced.record} if balanced.changed else {})
        yield Rewritten(checkpoint, record)


def _balance(
    checkpoint: Checkpoint, rewriting: Rewriting, dtype: str, quantised: bool, progress: Progress
) -> Balance | None:
    mode = rewriting.balance
    if quantised and mode in ("weights", "calibrated"):
        raise UsageError(
            f"--balance {mode} --quantize: blocks of integers have scales of their own and gain nothing from balanced "
            "cores; leave --balance out."
        )
    if mode == "none" or not checkpoint.factors or quantised or (mode == "auto" and dtype == "float32"):
        return None
    if mode == "calibrated":
        from mixt_export.optional import require
        from mixt_export.passes.maxima import intermediate_maxima

        require("torch", "--balance calibrated, which runs the model in PyTorch")
        maxima, _ = intermediate_maxima(checkpoint, progress=progress)
        return Balance(maxima, progress=progress)
    return Balance(least=AUTO_LEAST if mode == "auto" else 0.0, progress=progress)
