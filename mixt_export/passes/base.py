"""What a pass is: a checkpoint in, a checkpoint that computes the same out; conditions before and after."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from mixt_export.checkpoints import Checkpoint


@dataclass(frozen=True)
class PassResult:
    """What a pass made. ``checkpoint`` is the one it was given when nothing changed; ``record`` is plain JSON data."""

    checkpoint: Checkpoint
    changed: bool
    record: dict[str, Any] = field(default_factory=dict)


class Pass(Protocol):
    """One rewriting of a checkpoint. It never changes its argument and keeps nothing between calls."""

    @property
    def name(self) -> str:
        """How records and messages call it."""
        ...

    def requires(self, checkpoint: Checkpoint) -> None:
        """Raise a MixtError when the pass cannot be applied to ``checkpoint``."""
        ...

    def call(self, checkpoint: Checkpoint) -> PassResult:
        """The rewriting itself, laid over ``checkpoint`` (checkpoints.overlay)."""
        ...

    def ensures(self, checkpoint: Checkpoint, result: PassResult) -> None:
        """Raise MixtError (an internal error) when ``result`` does not compute what ``checkpoint`` did."""
        ...


def run(rewriting: Pass, checkpoint: Checkpoint) -> PassResult:
    """``requires``, ``call``, ``ensures``, in this order. Raises what they raise."""
    rewriting.requires(checkpoint)
    result = rewriting.call(checkpoint)
    if result.changed:
        rewriting.ensures(checkpoint, result)
    return result
