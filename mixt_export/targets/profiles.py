"""Optimisation profiles of a TensorRT folder: the shapes that an engine must accept, per kind of run.

A profile is plain data, ready for the manifest: ``{"name", "inputs": {input: {"min", "opt", "max"}}}``. TensorRT bounds
every dimension by itself, but wants each of the three shapes to be one that could run ("kMAX values are not
self-consistent"): the mask is as long as the longest cache and the most new tokens together.
"""

from __future__ import annotations

from typing import Any

from mixt_export.errors import ResourceError, UsageError
from mixt_export.families.wiring import Decoder

BOUNDS = ("min", "opt", "max")

#: New tokens per prefill unless asked otherwise: long prompts go in pieces, whose activations stay small.
DEFAULT_MAX_INPUT_LEN = 512

#: Most new tokens of "decode", which is tuned for one. Where a profile fixes them at one, TensorRT-RTX 1.7.1 holds the
#: weights of all linears twice, in the layout of each profile (benchmarks/trt_whole.py); with two it does not.
_DECODED = 2

#: Of all sequences of a run together: what TensorRT counts a tensor's elements by.
_MOST_POSITIONS = 2**31 - 1

Profile = dict[str, Any]


def profiles(decoder: Decoder, max_batch: int, max_input_len: int, max_seq_len: int) -> list[Profile]:
    """Profiles "prefill" (1 to ``max_input_len`` new tokens) and "decode" (one new token, or two), in this order.

    Both admit batches of 1 to ``max_batch`` sequences. Decoding admits every cache with room for one more token within
    ``max_seq_len`` positions, the empty one included. Prefill may run in pieces and admits caches of up to
    ``max_seq_len - max_input_len`` positions; the few prompt tokens behind a longer one go through "decode". Tuned for:
    prefill of a whole piece into an empty cache, decoding with a half-full cache, both at batch 1.

    Raises UsageError when the sizes contradict each other, ResourceError when no device could hold such a run.
    """
    if max_batch < 1:
        raise UsageError(f"--max-batch {max_batch}: must be at least 1.")
    if max_input_len < 1:
        raise UsageError(f"--max-input-len {max_input_len}: must be at least 1.")
    if max_seq_len < 2:
        raise UsageError(f"--max-seq-len {max_seq_len}: an engine needs at least 2 positions, a prompt and one token.")
    if max_input_len > max_seq_len:
        raise UsageError(
            f"--max-input-len {max_input_len} exceeds --max-seq-len {max_seq_len}: a prompt cannot be longer than the "
            "longest sequence; lower the one or raise the other."
        )
    if max_batch * max_seq_len > _MOST_POSITIONS:
        raise ResourceError(
            f"--max-batch {max_batch}: with --max-seq-len {max_seq_len} a run has more positions than any device "
            "holds; lower one of them."
        )
    half = max_seq_len // 2
    behind = max(max_seq_len - max_input_len, 1)  # a dimension of size 0 at most would be no dimension
    return [
        _profile(
            decoder, "prefill", batch=(1, 1, max_batch), seq=(1, max_input_len, max_input_len), past=(0, 0, behind),
            total=(1, max_input_len, behind + max_input_len),
        ),
        _profile(
            decoder, "decode", batch=(1, 1, max_batch), seq=(1, 1, _DECODED), past=(0, half, max_seq_len - 1),
            total=(1, half + 1, max_seq_len - 1 + _DECODED),
        ),
    ]  # fmt: skip


_Range = tuple[int, int, int]


def _profile(decoder: Decoder, name: str, *, batch: _Range, seq: _Range, past: _Range, total: _Range) -> Profile:
    heads, dim = decoder.kv_heads, decoder.head_dim
    shapes: dict[str, list[list[int]]] = {
        "input_ids": [list(sizes) for sizes in zip(batch, seq, strict=True)],
        "attention_mask": [list(sizes) for sizes in zip(batch, total, strict=True)],
    }
    for index in range(len(decoder.blocks)):
        for part in ("key", "value"):
            shapes[f"past_key_values.{index}.{part}"] = [
                [rows, heads, length, dim] for rows, length in zip(batch, past, strict=True)
            ]
    return {
        "name": name,
        "inputs": {key: dict(zip(BOUNDS, sizes, strict=True)) for key, sizes in shapes.items()},
    }
