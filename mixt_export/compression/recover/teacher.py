"""What the teacher says about every window, computed once: the frozen front of the student is the teacher's."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from mixt_export.compression.blocks import BlockwiseModel
from mixt_export.compression.precision import half_activations
from mixt_export.compression.recover.data import Windows
from mixt_export.compression.recover.settings import RecoverSettings
from mixt_export.compression.recover.tail import Head, final_norm
from mixt_export.compression.recover.vocabulary import Vocabulary
from mixt_export.compression.scratch import Scratch
from mixt_export.compression.streams import batches
from mixt_export.progress import Progress


@dataclass(frozen=True)
class Teacher:
    """Of all windows (windows, length, features) float32: ``inputs`` of the first factorised block, ``outputs`` behind
    the final norm. Of the training windows ``likely`` (windows, n) int32, the tokens with the largest summed
    probability.
    """

    tokens: torch.Tensor
    inputs: torch.Tensor
    outputs: torch.Tensor
    likely: torch.Tensor
    vocabulary: Vocabulary


@torch.no_grad()
def listen(
    model: BlockwiseModel,
    head: Head,
    windows: Windows,
    first: int,
    settings: RecoverSettings,
    scratch: Scratch,
    progress: Progress,
) -> Teacher:
    """Run the teacher block by block over all windows; arrays beyond 1 GiB are mapped from files in ``scratch``.

    Windows that are trained on may be computed in bfloat16, those that are measured never.
    """
    shape = (*windows.tokens.shape, model.hidden)
    hidden = model.embed(windows.tokens, scratch.working_array("outputs", shape))
    inputs = hidden
    with progress.task("running the teacher", model.blocks) as advance:
        for index in range(model.blocks):
            if index == first:
                inputs = torch.from_numpy(scratch.working_array("inputs", shape)).copy_(hidden)
            with model.block(index) as block:
                with half_activations():
                    for part in batches(windows.training, settings.batch):
                        hidden[part] = model.run(block, index, hidden[part])
                for window in range(windows.training, len(hidden)):
                    hidden[window : window + 1] = model.run(block, index, hidden[window : window + 1])
            advance(1)
    norm = final_norm(model)
    for window in range(len(hidden)):
        hidden[window] = norm(hidden[window])
    likely, vocabulary = _expectations(head, hidden[: windows.training], model, settings, progress)
    return Teacher(torch.from_numpy(np.ascontiguousarray(windows.tokens)), inputs, hidden, likely, vocabulary)


def _expectations(
    head: Head, outputs: torch.Tensor, model: BlockwiseModel, settings: RecoverSettings, progress: Progress
) -> tuple[torch.Tensor, Vocabulary]:
    """The likeliest tokens of every window, and those with the largest mean probability over all positions."""
    size = len(head.weight)
    count = min(settings.likely, size)
    likely = torch.empty(len(outputs), count, dtype=torch.int32)
    mean = torch.zeros(size, dtype=torch.float64)
    with progress.task("reading the teacher's expectations", len(outputs)) as advance, half_activations():
        for window, rows in enumerate(outputs):
            shares = torch.zeros(size)
            for span in model.spans(len(rows)):
                shares += torch.softmax(head.logits(rows[span]), -1, dtype=torch.float32).sum(0)
            mean += shares
            likely[window] = shares.topk(count).indices.int()
            advance(1)
    common = mean.argsort(descending=True, stable=True)[: settings.common].sort().values
    return likely, Vocabulary(common, size, settings.others)
