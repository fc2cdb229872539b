"""Calibration on what the dense model itself writes: no text is needed, and its domain is the model's own."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch

from mixt_export.checkpoints import Checkpoint
from mixt_export.compression.report import TextReport
from mixt_export.errors import ResourceError
from mixt_export.progress import Advance, Progress
from mixt_export.reference import load_reference

#: The name under which --calib asks for sampled text.
SELF = "self"
#: Sequences sampled at once: each holds a key-value cache.
AT_ONCE = 32


def sampled_windows(
    checkpoint: Checkpoint, count: int, length: int, seed: int, progress: Progress
) -> tuple[np.ndarray[Any, Any], TextReport]:
    """``count`` windows of ``length`` tokens sampled from the dense model at temperature 1.

    Each starts from its own uniformly drawn token, so that windows differ, as data-free quantisation does (LLM-QAT,
    arXiv 2305.17888). The whole model is in memory while it samples. Returns int64 (count, length) and its report.
    Raises ResourceError when float32 weights do not fit the memory that is available.
    """
    _require_memory(4 * sum(stored.ref.size for stored in checkpoint.store.values()))
    model: Any = load_reference(checkpoint.path, dtype="float32", attn="sdpa")
    generator = torch.Generator().manual_seed(seed)
    windows = torch.empty(count, length, dtype=torch.int64)
    with progress.task("sampling calibration text", count * length) as advance:
        for start in range(0, count, AT_ONCE):
            _sample(model, windows[start : start + AT_ONCE], generator, advance)
    array = windows.numpy()
    digest = hashlib.sha256(array.tobytes()).hexdigest()
    return array, TextReport(SELF, digest, array.size, count)


@torch.no_grad()
def _sample(model: Any, windows: torch.Tensor, generator: torch.Generator, advance: Advance) -> None:
    """Fill ``windows`` (sequences, length) int64 in place, token by token with a key-value cache."""
    count, length = windows.shape
    tokens = torch.randint(0, int(model.config.vocab_size), (count, 1), generator=generator)
    cache = None
    for position in range(length):
        windows[:, position] = tokens[:, 0]
        advance(count)
        if position + 1 < length:
            step = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = step.past_key_values
            shares = torch.softmax(step.logits[:, -1].float(), dim=-1)
            tokens = torch.multinomial(shares, 1, generator=generator)


def _require_memory(needed: int) -> None:
    available = _available_memory()
    if available is not None and needed > available:
        raise ResourceError(
            f"sampling text from the model holds it whole in memory: {needed / 1e9:.1f} GB, but "
            f"{available / 1e9:.1f} GB are available; give a text file instead."
        )


def _available_memory() -> int | None:
    """MemAvailable in bytes, or None where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:  # noqa: PTH123
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        return None
    return None
