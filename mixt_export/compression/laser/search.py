"""Greedy search over (linear, share of the rank): from the last block to the first, each edit judged by the loss.

What comes before a block is still the dense model when the block is searched, so its input is computed once and every
trial runs from there to the logits. In memory: one block, the trial's activations, the edits that were accepted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from mixt_export.compression.blocks import BlockwiseModel
from mixt_export.compression.scratch import Scratch
from mixt_export.compression.streams import batches
from mixt_export.progress import Progress


@dataclass
class Found:
    """``ranks``: the accepted edits, ``gains``: how much each lowered the loss (nats per token) when it was accepted.

    ``before``, ``after``: loss on the windows searched on; ``finished``: False where the time was over first.
    """

    ranks: dict[str, int] = field(default_factory=dict)
    gains: dict[str, float] = field(default_factory=dict)
    before: float = 0.0
    after: float = 0.0
    trials: int = 0
    finished: bool = True


@dataclass
class Search:
    """``targets``: block -> paths of its linears to try; ``product(name, rank)``: the truncated weight (out, in).

    ``tokens`` (windows, length) int64 give the loss. ``now``: seconds; the search stops after ``seconds`` of them.
    """

    model: BlockwiseModel
    targets: Mapping[int, Sequence[str]]
    tokens: np.ndarray[Any, Any]
    product: Callable[[str, int], torch.Tensor]
    scratch: Scratch
    batch: int
    seconds: float
    now: Callable[[], float] = time.monotonic

    @torch.no_grad()
    def run(self, ranks: Mapping[str, Sequence[int]], progress: Progress) -> Found:
        """The edits that lower the loss; ``ranks``: linear -> what to try. Of equal losses the smaller rank wins."""
        until = self.now() + self.seconds
        self._inputs()
        found = Found()
        start = max(self.targets)
        found.before = found.after = self._loss(start, {})
        total = sum(len(ranks[name]) for names in self.targets.values() for name in names)
        with progress.task("searching", total) as advance:
            for index in sorted(self.targets, reverse=True):
                for name in self.targets[index]:
                    best: tuple[float, int] | None = None
                    for rank in sorted(set(ranks[name])):
                        if self.now() >= until:
                            found.finished = False
                            return found
                        loss = self._loss(index, {**found.ranks, name: rank})
                        found.trials += 1
                        best = (loss, rank) if best is None or loss < best[0] else best
                        advance(1)
                    if best is not None and best[0] < found.after:
                        found.gains[name] = found.after - best[0]
                        found.after, found.ranks[name] = best
        return found

    @torch.no_grad()
    def loss(self, tokens: np.ndarray[Any, Any], edits: Mapping[str, int]) -> float:
        """Mean next-token loss of ``tokens`` (windows, length) with ``edits``, in nats."""
        hidden = self.model.embed(tokens, np.zeros((*tokens.shape, self.model.hidden), np.float32))
        for index in range(self.model.blocks):
            self._advance(index, hidden, edits)
        return self._head(hidden, tokens)

    def _inputs(self) -> None:
        """Keep what every targeted block reads in the dense model."""
        hidden = self.model.embed(self.tokens, np.zeros((*self.tokens.shape, self.model.hidden), np.float32))
        for index in range(max(self.targets) + 1):
            if index in self.targets:
                self.scratch.put(f"input:{index}", hidden.numpy())
            if index < max(self.targets):
                self._advance(index, hidden, {})

    def _loss(self, start: int, edits: Mapping[str, int]) -> float:
        hidden = torch.from_numpy(self.scratch.get(f"input:{start}"))
        for index in range(start, self.model.blocks):
            self._advance(index, hidden, edits)
        return self._head(hidden, self.tokens)

    def _advance(self, index: int, hidden: torch.Tensor, edits: Mapping[str, int]) -> None:
        """Overwrite ``hidden`` by the output of block ``index``, its edited linears truncated."""
        prefix = f"{self.model.block_path(index)}."
        with self.model.block(index) as layer:
            for name, rank in edits.items():
                if name.startswith(prefix):
                    linear = layer.get_submodule(name.removeprefix(prefix))
                    linear.weight = nn.Parameter(self.product(name, rank), requires_grad=False)
            for part in batches(len(hidden), self.batch):
                hidden[part] = self.model.run(layer, index, hidden[part])

    def _head(self, hidden: torch.Tensor, tokens: np.ndarray[Any, Any]) -> float:
        total = 0.0
        with self.model.head() as logits:
            for window, row in zip(hidden, tokens, strict=True):
                targets = torch.from_numpy(row[1:])
                for span in self.model.spans(len(targets)):
                    part = nn.functional.cross_entropy(logits(window[:-1][span]), targets[span], reduction="sum")
                    total += float(part)
        return total / float(len(tokens) * (tokens.shape[1] - 1))
