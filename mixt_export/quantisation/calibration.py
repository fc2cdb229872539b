"""Round every matrix of a graph in turn, each by what it reads once everything before it is rounded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from mixt_export.progress import SILENT, Progress
from mixt_export.quantisation.blocks import Blocks, dequantised, stacked
from mixt_export.quantisation.calibrated import calibrated
from mixt_export.quantisation.nearest import nearest
from mixt_export.quantisation.segments import Piece, Read, Runner, Values, blocks_of, cut, inputs_of

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Target:
    """A matrix to round: ``transposed`` when the graph holds it as (inputs, outputs). ``nearest``: no calibration.

    ``scale_dtype``: scales are positive and exact in that dtype.
    """

    bits: int
    group: int
    transposed: bool
    nearest: bool = False
    scale_dtype: str = ""


def calibrate(
    model: onnx.ModelProto,
    targets: Mapping[str, Target],
    read: Read,
    windows: Sequence[Ids],
    keep: Callable[[str, Blocks], None],
    *,
    threads: int = 0,
    progress: Progress = SILENT,
) -> int:
    """Give ``keep`` the blocks of every matrix of ``model`` named in ``targets``; how many were calibrated.

    ``model``: a decoder's graph with logits of every position; ``read(name)``: the value of an initializer in the
    graph's layout; ``windows``: tokens (length,) each. Blocks of the decoder run one after the other with the rounded
    matrices before them, as they will run later. A matrix whose input cannot be observed (the embedding's table) is
    rounded to nearest.
    """
    states = [inputs_of(model, window) for window in windows]
    tables: Values = {}
    count = 0
    with progress.task("rounding by calibration", len(blocks_of(model.graph.node))) as done:
        for piece in cut(model, targets, ("logits",), read):
            count += _round(piece, targets, read, states, tables, keep, threads)
            done(1)
    return count


def _round(
    piece: Piece,
    targets: Mapping[str, Target],
    read: Read,
    states: list[Values],
    tables: Values,
    keep: Callable[[str, Blocks], None],
    threads: int,
) -> int:
    """Round what is multiplied by in ``piece`` and run it on; ``tables``: those rounded before that later pieces read.

    A matrix whose input cannot be observed, as that of a lookup, is rounded to nearest, and once for the whole graph.
    """
    matrices = {name: tables[name] if name in tables else np.ascontiguousarray(read(name)) for name in piece.matrices}
    due = [name for name in piece.matrices if name not in tables]
    calibrated_ones = {name for name in due if name in piece.observed and not targets[name].nearest}
    moments = _moments(piece, states, matrices, threads) if calibrated_ones else {}
    for name in due:
        target = targets[name]
        value = matrices[name].T if target.transposed else matrices[name]
        known = moments[name] if name in calibrated_ones else None
        if known is None:
            blocks = nearest(value, target.bits, target.group, scale_dtype=target.scale_dtype)
        else:
            bits, group, kind = target.bits, target.group, target.scale_dtype
            blocks = stacked([calibrated(value[rows], gram, bits, group, scale_dtype=kind) for rows, gram in known])
        keep(name, blocks)
        rounded = dequantised(blocks)
        matrices[name] = np.ascontiguousarray(rounded.T if target.transposed else rounded)
        if name not in piece.observed:
            tables[name] = matrices[name]
    advance(piece, states, matrices, threads)
    return len(calibrated_ones)


def _moments(
    piece: Piece, states: Iterable[Values], matrices: Values, threads: int
) -> dict[str, list[tuple[slice, NDArray[np.float64]]]]:
    """Rows of each matrix and Σ x xᵀ (K, K) of what they are to be rounded by, over all windows.

    Rows that are rounded by the same share the array.
    """
    runner = Runner(piece.observing, threads)
    sums: dict[str, NDArray[np.float64]] = {}
    for state in states:
        found = runner.run({name: state[name] for name in piece.reads}, matrices)
        for output in {part.output for parts in piece.observed.values() for part in parts}:
            if output in sums:
                sums[output] += found[output]
            else:
                sums[output] = found[output].astype(np.float64)
    return {
        name: [(slice(part.begin, part.end), sums[part.output]) for part in parts]
        for name, parts in piece.observed.items()
    }


def advance(piece: Piece, states: list[Values], matrices: Values, threads: int) -> None:
    """Run ``piece`` on every state and add what it gives to the state; nothing for the last piece."""
    if not piece.gives or piece.gives == ("logits",):
        return
    runner = Runner(piece.model, threads)
    for state in states:
        state.update(runner.run({name: state[name] for name in piece.reads}, matrices))


def logits_of(
    model: onnx.ModelProto, read: Read, windows: Sequence[Ids], *, threads: int = 0
) -> Iterator[NDArray[np.float32]]:
    """Logits (length, vocab) of each window, block by block with the weights as they are."""
    states = [inputs_of(model, window) for window in windows]
    for piece in cut(model, (), ("logits",), read):
        if "logits" not in piece.gives:
            advance(piece, states, {}, threads)
            continue
        runner = Runner(piece.model, threads)
        for state in states:
            yield runner.run({name: state[name] for name in piece.reads}, {})["logits"][0]
