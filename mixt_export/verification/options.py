"""What `verify` may be asked to do differently."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mixt_export.errors import UsageError

DEFAULT_POSITIONS = 256
THOROUGH_POSITIONS = 2048
#: Positions that an export must have to be verified: a token, and those that are decoded after it.
SHORTEST = 5


@dataclass(frozen=True)
class VerifyOptions:
    """Options of verify.

    ``prompts``: a UTF-8 file with one prompt per line, instead of the shipped prompts.
    ``positions``: teacher-forced positions (None: 256, or 2,048 when ``thorough``).
    ``batch``: sequences of the ragged batch. ``greedy_tokens``: length of each greedy continuation (None: 32 or 64).
    ``tolerance``: relative L2 of logits that passes (None: 1e-5 at float32; at float16 what the dtype costs, measured).
    ``memory``: measure memory in fresh processes. ``threads``: 0 means half the cores. ``seed``: random choices.
    ``write``: write report.json and report.html into the exported folder.
    """

    prompts: Path | None = None
    positions: int | None = None
    batch: int = 3
    greedy_tokens: int | None = None
    tolerance: float | None = None
    memory: bool = True
    threads: int = 0
    seed: int = 0
    thorough: bool = False
    write: bool = True

    def __post_init__(self) -> None:
        """Raise UsageError on a value out of range."""
        _at_least("--positions", self.positions, 2)
        _at_least("--batch", self.batch, 2)
        _at_least("--greedy-tokens", self.greedy_tokens, 1)
        _at_least("--threads", self.threads, 0)
        if self.tolerance is not None and not 0.0 < self.tolerance < 1.0:
            raise UsageError(f"--tolerance {self.tolerance}: give a relative L2 between 0 and 1, such as 1e-5.")

    @property
    def wanted_positions(self) -> int:
        """Teacher-forced positions after defaults."""
        return self.positions or (THOROUGH_POSITIONS if self.thorough else DEFAULT_POSITIONS)

    @property
    def wanted_greedy_tokens(self) -> int:
        """Greedy tokens per prompt after defaults."""
        return self.greedy_tokens or (64 if self.thorough else 32)


def _at_least(option: str, value: int | None, minimum: int) -> None:
    if value is not None and value < minimum:
        raise UsageError(f"{option} {value}: must be at least {minimum}.")
