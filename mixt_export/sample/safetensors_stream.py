"""Write a safetensors file tensor by tensor, in a given order, without holding more than one piece."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mixt_export.checkpoints.write import encode_header
from mixt_export.network import TensorRef

#: The data section starts at a multiple of this, so that a mapping of the file keeps tensors aligned for SIMD loads.
DATA_ALIGNMENT = 4096


def write_float32(
    path: Path, shapes: Mapping[str, tuple[int, ...]], pieces: Iterable[tuple[str, NDArray[np.float32]]]
) -> str:
    """Write float32 tensors to ``path`` in the order of ``shapes`` and return the file's sha256 (hex).

    ``pieces`` yields (name, array): the tensors in that same order, each whole or as consecutive runs of its leading
    axis. Format: https://huggingface.co/docs/safetensors (8-byte little-endian header length, JSON header padded with
    spaces, data). Raises ValueError when the pieces do not fill the announced tensors.
    """
    digest = hashlib.sha256()
    with path.open("wb") as sink:
        refs = [TensorRef(name, tuple(shape), "float32") for name, shape in shapes.items()]
        head = encode_header(refs, {"format": "pt"}, DATA_ALIGNMENT)
        sink.write(head)
        digest.update(head)
        wanted = [(name, 4 * int(np.prod(shape))) for name, shape in shapes.items()]
        at, filled = 0, 0
        for name, piece in pieces:
            if at == len(wanted) or name != wanted[at][0] or piece.shape[1:] != shapes[name][1:]:
                raise ValueError(f"tensor {name} of shape {piece.shape} was not expected at position {at}")
            data = np.ascontiguousarray(piece, dtype="<f4").data.cast("B")
            sink.write(data)
            digest.update(data)
            filled += data.nbytes
            if filled > wanted[at][1]:
                raise ValueError(f"tensor {name} has more than the announced {wanted[at][1]} bytes")
            if filled == wanted[at][1]:
                at, filled = at + 1, 0
        if at != len(wanted):
            raise ValueError(f"tensor {wanted[at][0]} is missing or incomplete")
    return digest.hexdigest()
