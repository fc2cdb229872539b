"""Every way a decoder is run, against a model that runs one whole sequence at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from tests.ortrun import Graph, relative

#: Pieces of a prompt, one-token steps among them, over one cache.
PIECES = (9, 1, 1, 7, 5)
LENGTHS = (11, 4, 8)


def logits_of(model: torch.nn.Module, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(ids[None])).logits[0].numpy()


def worst(model: torch.nn.Module, folder: Path, *, left_padded: bool = True) -> float:
    """Largest relative error over a prefill, a prompt in pieces, steps over the cache, and a padded batch of three."""
    graph, rng = Graph(folder), np.random.default_rng(7)
    ids = rng.integers(0, 300, sum(PIECES))
    expected = logits_of(model, ids)
    whole, _ = graph.run(ids[None])
    errors = [relative(whole[0], expected[-1])]
    past, seen = None, 0
    for size in PIECES:
        logits, past = graph.run(ids[None, seen : seen + size], past)
        seen += size
        errors.append(relative(logits[0], expected[seen - 1]))

    longest, rows = max(LENGTHS), [rng.integers(0, 300, n) for n in LENGTHS]
    step = rng.integers(0, 300, (len(rows), 1))
    batch, mask = np.zeros((len(rows), longest), np.int64), np.zeros((len(rows), longest), np.int64)
    for row, tokens in enumerate(rows):
        where = slice(longest - len(tokens), longest) if left_padded else slice(0, len(tokens))
        batch[row, where], mask[row, where] = tokens, 1
    logits, past = graph.run(batch, mask=mask)
    errors += [relative(logits[row], logits_of(model, tokens)[-1]) for row, tokens in enumerate(rows)]
    if left_padded:
        mask = np.concatenate([mask, np.ones((len(rows), 1), np.int64)], axis=1)
    else:  # a row's mask counts its tokens, the new one is written behind them
        mask = np.array([[1] * (n + 1) + [0] * (longest - n) for n in LENGTHS], np.int64)
    logits, _ = graph.run(step, past, mask)
    for row, tokens in enumerate(rows):
        errors.append(relative(logits[row], logits_of(model, np.append(tokens, step[row]))[-1]))
    return max(errors)
