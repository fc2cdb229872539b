"""The prompt in pieces: whatever the split, the logits after each piece must be the same."""

from __future__ import annotations

import numpy as np

from mixt_export.verification.checks.compare import logits_result
from mixt_export.verification.context import Context
from mixt_export.verification.result import CheckResult
from mixt_export.verification.routes import Pieces

NAME = "chunked_prefill"
TITLE = "Chunked prefill"


def splits(length: int, seed: int = 0) -> list[list[int]]:
    """Ways to cut ``length`` tokens: whole, one off either end, odd sizes, sevens, and random ones."""
    cuts = [
        [],
        [1],
        [length - 1],
        [length // 3 | 1, length // 2 | 1],
        list(range(7, length, 7)),
        np.random.default_rng(seed).integers(1, max(length, 2), 4).tolist(),
    ]
    edges = [[0, *sorted({cut for cut in row if 0 < cut < length}), length] for row in cuts]
    unique = {tuple(np.diff(row).tolist()): None for row in edges}
    return [list(sizes) for sizes in unique]


def run(context: Context) -> CheckResult:
    """Compare the last position after every chunk of every split."""
    comparison, runner = context.comparison(), context.plain()
    expected = context.probe_reference[0]
    ways = splits(len(context.probe), context.options.seed)
    with context.progress.task(TITLE, len(ways)) as advance:
        worst: list[int] = []
        for sizes in ways:
            ends = np.cumsum(sizes) - 1
            failed_before = bool(context.gate.judge(comparison)) if comparison.positions else False
            comparison.add(np.stack(runner.chunks(context.probe, sizes)), expected[ends])
            if not failed_before and context.gate.judge(comparison):
                worst = sizes
            advance(1)
    route = Pieces(context.probe, worst or ways[0])
    return logits_result(context, NAME, TITLE, comparison, route=route, detail={"splits": len(ways)})
