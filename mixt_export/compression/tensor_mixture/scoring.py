"""Perplexity of several variants of a model, and KL to the original, from the outputs of their last blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mixt_export.compression.blocks import BlockwiseModel
from mixt_export.compression.controls import DENSE, Score
from mixt_export.progress import Progress


@torch.no_grad()
def scores(
    model: BlockwiseModel,
    tokens: Sequence[np.ndarray[Any, Any]],
    outputs: Mapping[str, Sequence[torch.Tensor]],
    progress: Progress,
    label: str = "scoring controls",
) -> list[dict[str, Score]]:
    """For each text the score of every variant.

    ``tokens``: per text (windows, length) int64; ``outputs``: variant -> per text (windows, length, features), the
    original under DENSE. Logits of a few hundred tokens exist at a time.
    """
    found = []
    with model.head() as logits, progress.task(label, sum(map(len, tokens))) as advance:
        for text, windows in enumerate(tokens):
            sums = {variant: [0.0, 0.0] for variant in outputs}
            for number, window in enumerate(windows):
                for span in model.spans(len(window) - 1):
                    targets = torch.from_numpy(window[1:][span])[:, None]
                    truth = logits(outputs[DENSE][text][number][:-1][span]).log_softmax(-1)
                    for variant, per_text in outputs.items():
                        mine = logits(per_text[text][number][:-1][span]).log_softmax(-1)
                        sums[variant][0] -= float(mine.gather(1, targets).double().sum())
                        sums[variant][1] += float((truth.exp() * (truth - mine)).double().sum())
                advance(1)
            count = len(windows) * (windows.shape[1] - 1)
            found.append({name: Score.of(nll / count, max(kl, 0.0) / count) for name, (nll, kl) in sums.items()})
    return found
