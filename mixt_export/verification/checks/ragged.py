"""Sequences of different lengths for the batch checks."""

from __future__ import annotations

import numpy as np

from mixt_export.verification.context import Context
from mixt_export.verification.session import Ids

_LONGEST = 40
#: Tokens that batch_decode appends one by one.
DECODED = 4


def ragged_batch(context: Context) -> list[Ids]:
    """``--batch`` sequences whose lengths run from short to long in no order, room left for DECODED more tokens."""
    stream = np.concatenate([*context.sequences.windows, *context.sequences.prompts])
    longest = min(_LONGEST, context.max_length - DECODED, len(stream) - DECODED)
    rng = np.random.default_rng(context.options.seed)
    lengths = rng.integers(1, longest + 1, context.options.batch)
    lengths[0], lengths[1] = max(longest // 3, 1), longest  # a padded and an unpadded row, always
    starts = rng.integers(0, len(stream) - longest - DECODED + 1, context.options.batch)
    return [stream[start : start + length] for start, length in zip(starts.tolist(), lengths.tolist(), strict=True)]
