"""A long cache and a few tokens behind it: far positions without running a long text first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixt_export.verification.graph import ExportedGraph

#: New tokens behind the cache: a piece of several, then one by one.
SIZES = (4, 1, 1)
#: Bytes of cache that are worth it; a window of attention may ask for more.
_BYTES = 64 << 20


def far_length(graph: ExportedGraph, config: Mapping[str, Any], max_length: int) -> int:
    """Positions of the cache: the most that leaves room within ``max_length``, or what memory and windows suggest."""
    windows = config.get("sliding_window"), config.get("attention_window")
    widest = max((value for value in windows if isinstance(value, int)), default=0)
    affordable = max(_BYTES // max(graph.kv_bytes_per_token, 1), widest + 2 * sum(SIZES))
    return max(min(max_length - sum(SIZES), affordable), 1)


def long_cache(graph: ExportedGraph, text: Sequence[NDArray[np.float32]], length: int) -> list[NDArray[np.float32]]:
    """The cache of a short text over and over, float32 (1, kv_heads, length, head_dim).

    Keys and values of a real text keep the activations of a trained model in the range that it was trained for; random
    ones make PyTorch's own rounding errors ten times as large. Rounded as the graph's cache is, so that both models
    are given the same numbers.
    """
    kept = np.float16 if graph.dtype == "float16" else np.float32
    return [np.take(array, np.arange(length), axis=2, mode="wrap").astype(kept).astype(np.float32) for array in text]
