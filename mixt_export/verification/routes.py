"""Ways to bring tokens through an exported graph: in pieces with the cache, or as a ragged batch and then steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mixt_export.verification.session import ExportedRunner, Ids

Values = list[NDArray[Any]]
Past = Sequence[NDArray[np.float32]]


class Route(Protocol):
    """``sequences``: what the reference sees, one at a time, behind ``past``."""

    @property
    def past(self) -> Past:
        """Keys and values of every block in turn, float32 (1, kv_heads, past, head_dim); none: from the beginning."""
        ...

    @property
    def emulated(self) -> bool:
        """Whether the graph runs as it is typed, see ExportedGraph.rounds."""
        ...

    @property
    def sequences(self) -> list[Ids]:
        """Whole sequences (seq,), in the order in which `values` gives theirs."""
        ...

    def values(self, runner: ExportedRunner) -> list[Values]:
        """Per sequence the runner's inner values (seq, …), one row a token; raises RunFailed as the runner."""
        ...


@dataclass(frozen=True)
class Pieces:
    """One sequence (seq,) in pieces of ``sizes`` with the cache carried along; one piece is a plain prefill."""

    tokens: Ids
    sizes: Sequence[int]
    past: Past = ()
    emulated: bool = False

    @property
    def sequences(self) -> list[Ids]:
        """The one sequence."""
        return [self.tokens]

    def values(self, runner: ExportedRunner) -> list[Values]:
        """See Route.values."""
        cache = runner.given(self.past) if self.past else None
        start, parts, before = 0, [], self.past[0].shape[2] if self.past else 0
        for size in self.sizes:
            end = start + size
            mask = np.ones((1, before + end), np.int64)
            step = runner.run(self.tokens[None, start:end], mask, cache, want_cache=True)
            parts.append([value[0] for value in step.layers])
            cache, start = step.cache, end
        return [[np.concatenate(pieces) for pieces in zip(*parts, strict=True)]]


@dataclass(frozen=True)
class Ragged:
    """A padded batch, then ``more`` (sequences, steps) one token at a time with the cache; no columns: prefill only."""

    starts: list[Ids]
    more: Ids
    past: Past = ()
    emulated: bool = False

    @property
    def sequences(self) -> list[Ids]:
        """Every row with what is decoded after it."""
        return [np.concatenate([start, rest]) for start, rest in zip(self.starts, self.more, strict=True)]

    def values(self, runner: ExportedRunner) -> list[Values]:
        """See Route.values."""
        ids, mask = runner.padded(self.starts)
        step = runner.run(ids, mask, want_cache=True)
        spans = [runner.valid(len(start), ids.shape[1]) for start in self.starts]
        rows = [[[value[row, span] for value in step.layers]] for row, span in enumerate(spans)]
        for turn in range(self.more.shape[1]):
            mask = runner.grow(mask)
            step = runner.run(self.more[:, turn : turn + 1], mask, step.cache, want_cache=True)
            for row, parts in enumerate(rows):
                parts.append([value[row] for value in step.layers])
        return [[np.concatenate(pieces) for pieces in zip(*parts, strict=True)] for parts in rows]
