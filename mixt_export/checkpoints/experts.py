"""Experts of one layer that a folder stores stacked in one tensor, seen as the matrices of the single experts.

transformers keeps the experts of a layer in memory as ``experts.gate_up_proj`` (experts, 2 · inner, hidden), gate
above up, and ``experts.down_proj`` (experts, hidden, inner). Published folders hold ``experts.N.gate_proj.weight`` and
so on instead, but a folder saved without transformers' conversion holds the stacks. A matrix of a stack is a contiguous
piece of the file, so the one spelling becomes the other by arithmetic on headers; no weight is touched.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from mixt_export.checkpoints.store import StoredTensor, TensorStore
from mixt_export.errors import CheckpointError
from mixt_export.network import TensorRef

#: Model types whose stacks are laid out as above (other families transpose or interleave theirs).
MODEL_TYPES = frozenset({"qwen3_moe"})

#: Last name of a stack -> the linears whose weights lie one below the other in each of its matrices.
STACKS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}

_STACK = re.compile(rf"(.*\.experts)\.({'|'.join(STACKS)})")


def unstacked(store: TensorStore, config: Mapping[str, Any]) -> TensorStore:
    """``store`` with every stack of experts replaced by the tensors ``experts.N.<linear>.weight`` (out, in).

    Other tensors, and all tensors of a model type without stacks, stay as they are. Raises CheckpointError when a stack
    has not three axes, its middle axis does not divide into its linears, or an expert is stored twice.
    """
    if config.get("model_type") not in MODEL_TYPES or not any(map(_STACK.fullmatch, store)):
        return store
    tensors: dict[str, StoredTensor] = {}
    for name, stored in store.items():
        match = _STACK.fullmatch(name)
        pieces = [stored] if match is None else _pieces(stored, match[1], STACKS[match[2]])
        for piece in pieces:
            if piece.ref.name in tensors or (piece is not stored and piece.ref.name in store):
                raise CheckpointError(
                    f"{stored.path}: tensor {piece.ref.name!r} is stored both alone and in a stack of experts; "
                    "keep one of the two."
                )
            tensors[piece.ref.name] = piece
    return TensorStore(tensors)


def _pieces(stored: StoredTensor, prefix: str, linears: tuple[str, ...]) -> Iterator[StoredTensor]:
    """The matrices of one stack, in the order of the file."""
    shape = stored.ref.shape
    if len(shape) != 3 or shape[1] % len(linears):
        raise CheckpointError(
            f"{stored.path}: tensor {stored.ref.name!r} has shape {list(shape)}; a stack of experts has three axes, "
            f"the second a multiple of {len(linears)}; download the model again."
        )
    rows = shape[1] // len(linears)
    nbytes = stored.nbytes // max(1, shape[0] * len(linears))
    for number in range(shape[0] * len(linears)):
        expert, part = divmod(number, len(linears))
        name = f"{prefix}.{expert}.{linears[part]}.weight"
        ref = TensorRef(name, (rows, shape[2]), stored.ref.dtype)
        yield replace(stored, ref=ref, offset=stored.offset + number * nbytes, nbytes=nbytes)
