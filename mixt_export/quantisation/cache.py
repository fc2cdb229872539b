"""Keys and values of the cache at 8 bits: one scale for each channel of each head, found on calibration text.

A rotary embedding turns channels of keys in pairs, by angles that grow with the position. So both of a pair take the
largest length of the pair, which no position changes; otherwise a long context would leave the range that short
windows of text have shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from mixt_export.errors import MixtError
from mixt_export.progress import SILENT, Progress
from mixt_export.quantisation.ranges import largest_of
from mixt_export.quantisation.segments import Read

Ids = NDArray[np.int64]
Pairs = Sequence[tuple[int, int]]

#: Codes go from -128 to 127; the largest magnitude that calibration saw becomes 127.
LARGEST = 127
PARTS = ("key", "value")


@dataclass(frozen=True)
class Int8Cache:
    """What `--kv-cache int8` asks for. ``texts``: to calibrate on, by default the shipped; ``measure``: the loss."""

    texts: tuple[Path, ...] = ()
    measure: bool = True


@dataclass
class CacheScales:
    """(1, kv_heads, 1, head_dim) float32 scales of the keys and values of each block; empty until they are measured."""

    found: dict[tuple[int, str], NDArray[np.float32]] = field(default_factory=dict)

    def of(self, layer: int, part: str) -> NDArray[np.float32]:
        """Scales of the ``part`` "key" or "value" of block ``layer``."""
        if (layer, part) not in self.found:
            raise MixtError(f"the range of block {layer}'s {part}s was not measured. Please report this.")
        return self.found[layer, part]


def measure_cache(
    model: onnx.ModelProto,
    read: Read,
    windows: Sequence[Ids],
    turned: Sequence[Pairs],
    scales: CacheScales,
    *,
    threads: int = 0,
    progress: Progress = SILENT,
) -> None:
    """Fill ``scales`` by running ``windows`` of tokens through the float graph ``model``, block by block.

    ``turned``: channels of each block's keys that a rotary embedding turns together. A channel that is always 0 has the
    scale 1.
    """
    names = {f"present.{layer}.{part}": (layer, part) for layer in range(len(turned)) for part in PARTS}

    def seen(name: str, values: NDArray[Any]) -> NDArray[np.float32]:
        layer, part = names[name]
        return _channels(values, turned[layer] if part == "key" else ())

    label = "measuring keys and values"
    largest = largest_of(model, read, windows, names, seen, label, threads=threads, progress=progress)
    for name, most in largest.items():
        scale = np.where(most > 0, most / LARGEST, 1.0).astype(np.float32)
        scales.found[names[name]] = scale[None, :, None, :]


def _channels(values: NDArray[Any], pairs: Pairs) -> NDArray[np.float32]:
    """(heads, channels): largest magnitude of each channel of (1, heads, tokens, channels), of a pair its length."""
    squares = np.square(values[0].astype(np.float64))
    for first, second in pairs:
        squares[..., first] = squares[..., second] = squares[..., first] + squares[..., second]
    most: NDArray[np.float32] = np.sqrt(squares.max(axis=1)).astype(np.float32)
    return most
