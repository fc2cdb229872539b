"""Smoothing: what makes a product's input is divided, channel by channel, by what its matrix is multiplied by.

Exact in real numbers. It evens out the channels of activations that are rounded with one scale for all of them, at the
price of columns that are less even (Xiao et al., SmoothQuant, 2022, equation 4). What is divided is the weight of a
norm, the rows of the values behind an attention, or the rows of the linear that a gate is multiplied by.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from mixt_export.checkpoints.write import encode_header
from mixt_export.errors import MixtError
from mixt_export.network import TensorRef
from mixt_export.progress import SILENT, Progress
from mixt_export.quantisation.ranges import largest_of
from mixt_export.quantisation.segments import Read

Ids = NDArray[np.int64]
Factors = NDArray[np.float32]

#: File of an exported folder with the factors of every smoothed matrix.
FILE = "smoothing.safetensors"
#: A channel, or a column, of less than this share of the largest counts as of so much: one that calibration has never
#: seen moved would become as large as all others, and a thousand times that when it does move.
_LEAST = 1e-4


@dataclass(frozen=True)
class Place:
    """Axis ``axis`` of the initializer ``name``, from ``begin`` on, in the graph's layout."""

    name: str
    axis: int = 0
    begin: int = 0


@dataclass(frozen=True)
class Group:
    """Products that read the value ``source``, and what makes it.

    ``readers``: their matrices, multiplied along their inputs; ``makers``: what is divided. ``power``: how much of the
    unevenness moves into the matrices, 0 to 1. ``heads``: keys and values, and how many heads read each: those share
    factors. ``tokens``: activations are rounded with a scale for each token instead of one for all. ``cache``: the
    graph's input with values of earlier tokens, which are divided as well.
    """

    source: str
    readers: tuple[Place, ...]
    makers: tuple[Place, ...]
    power: float
    heads: tuple[int, int] = (1, 1)
    tokens: bool = False
    cache: str = ""

    def spread(self, factors: Factors) -> Factors:
        """Factors of every channel of ``source``."""
        kept, share = self.heads
        return np.repeat(factors.reshape(kept, 1, -1), share, axis=1).reshape(-1)

    def gathered(self, largest: NDArray[Any]) -> NDArray[Any]:
        """The largest of ``largest`` (channels of ``source``,) of all channels with the same factor."""
        kept, share = self.heads
        found: NDArray[Any] = largest.reshape(kept, share, -1).max(axis=1).reshape(-1)
        return found


@dataclass
class Smoothing:
    """Groups of a graph, and by their sources the factors that were ``found``; none until they are measured."""

    groups: Sequence[Group]
    found: dict[str, Factors] = field(default_factory=dict)

    @property
    def readers(self) -> dict[str, Group]:
        """Matrix -> the group whose input it reads."""
        return {place.name: group for group in self.groups for place in group.readers}

    @property
    def names(self) -> set[str]:
        """Every initializer that changes."""
        return {place.name for group in self.groups for place in (*group.readers, *group.makers)}

    def applied(self, name: str, value: NDArray[Any]) -> NDArray[Any]:
        """The ``value`` of the initializer ``name`` with its factors, each product rounded once."""
        parts = list(self._of(name))
        if not parts:
            return value
        wide = value.astype(np.float64)
        for place, factors, divided in parts:
            part = wide.swapaxes(0, place.axis)[place.begin : place.begin + len(factors)]
            column = factors.astype(np.float64).reshape(-1, *[1] * (part.ndim - 1))
            if divided:
                part /= column
            else:
                part *= column
        return np.ascontiguousarray(wide, value.dtype)

    def sides(self, name: str, rows: int) -> dict[str, Factors]:
        """What the matrix ``name`` of ``rows`` outputs was changed by.

        ``inputs``: its columns were multiplied by; ``outputs``: its rows were divided by. Empty where it was not.
        """
        found: dict[str, Factors] = {}
        for place, factors, divided in self._of(name):
            if divided:
                outputs = found.setdefault("outputs", np.ones(rows, np.float32))
                outputs[place.begin : place.begin + len(factors)] = factors
            else:
                found["inputs"] = factors
        return found

    def _of(self, name: str) -> Iterator[tuple[Place, Factors, bool]]:
        for group in self.groups:
            for places, divided in ((group.readers, False), (group.makers, True)):
                for place in places:
                    if place.name == name:
                        factors = self._known(group)
                        yield place, factors if divided else group.spread(factors), divided

    def _known(self, group: Group) -> Factors:
        if group.source not in self.found:
            raise MixtError(f"the range of {group.source} was not measured. Please report this.")
        return self.found[group.source]


def measure_smoothing(
    model: onnx.ModelProto,
    read: Read,
    windows: Sequence[Ids],
    smoothing: Smoothing,
    *,
    threads: int = 0,
    progress: Progress = SILENT,
) -> None:
    """Find the factors of ``smoothing`` by running ``windows`` of tokens through the float graph ``model``.

    First positions count: heads rest on them, and a few of their channels are a hundred times as large as anywhere
    else, so that everything behind them is lost where those are not smoothed (docs/quantisation.md).
    """

    def seen(_name: str, values: NDArray[Any]) -> NDArray[Any]:
        most: NDArray[Any] = np.abs(values[0]).max(axis=0)
        return most

    sources = {group.source for group in smoothing.groups}
    label = "measuring activations"
    largest = largest_of(model, read, windows, sources, seen, label, threads=threads, progress=progress)
    for group in smoothing.groups:
        weights = [np.abs(read(place.name)).max(axis=1 - place.axis) for place in group.readers]
        most, wide = group.gathered(largest[group.source]), group.gathered(np.max(weights, axis=0))
        smoothing.found[group.source] = factors_of(most, wide, group.power)


def factors_of(largest: NDArray[Any], weights: NDArray[Any], power: float) -> Factors:
    """Factors of geometric mean 1 for channels whose inputs reach ``largest``, and whose columns ``weights``."""
    if not (largest.max() > 0 and weights.max() > 0):
        return np.ones(len(largest), np.float32)
    inputs, columns = (np.log(np.maximum(part, _LEAST * part.max()).astype(np.float64)) for part in (largest, weights))
    wanted = power * inputs - (1 - power) * columns
    found: Factors = np.exp(wanted - wanted.mean()).astype(np.float32)
    return found


def write_factors(smoothing: Smoothing, rows: Mapping[str, int], path: Path) -> None:
    """Write factors as safetensors: `sides` of the matrices ``rows`` (name -> outputs), and those of cached values.

    Their names: NAME.inputs and NAME.outputs of a matrix; that of the graph's input for a cache, (heads · head_dim,).
    """
    tensors = {
        f"{name}.{side}": values
        for name, count in rows.items()
        for side, values in smoothing.sides(name, count).items()
    }
    tensors |= {group.cache: smoothing.found[group.source] for group in smoothing.groups if group.cache}
    refs = [TensorRef(name, values.shape, "float32") for name, values in tensors.items()]
    with path.open("wb") as file:
        file.write(encode_header(refs, {"format": "mixt-smoothing"}))
        for values in tensors.values():
            file.write(np.ascontiguousarray(values, "<f4").tobytes())
