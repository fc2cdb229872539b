"""How far values inside a float graph reach on calibration text, found block by block."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from mixt_export.progress import SILENT, Progress
from mixt_export.quantisation.segments import Read, Runner, Values, blocks_of, cut, inputs_of


def largest_of(
    model: onnx.ModelProto,
    read: Read,
    windows: Sequence[NDArray[np.int64]],
    names: Collection[str],
    seen: Callable[[str, NDArray[Any]], NDArray[Any]],
    label: str,
    *,
    threads: int = 0,
    progress: Progress = SILENT,
) -> dict[str, NDArray[Any]]:
    """The largest of ``seen(name, value)`` over ``windows`` of tokens, element by element, of the values ``names``.

    ``label``: what the progress says is done.
    """
    largest: dict[str, NDArray[Any]] = {}
    wanted = set(names)
    states = [inputs_of(model, window) for window in windows]
    with progress.task(label, len(blocks_of(model.graph.node))) as done:
        for piece in cut(model, (), tuple(names), read):
            done(1)
            if not piece.gives:  # the head
                continue
            runner = Runner(piece.model, threads)
            for state in states:
                found: Values = runner.run({name: state[name] for name in piece.reads}, {})
                for name in wanted & found.keys():
                    reach = seen(name, found.pop(name))
                    largest[name] = np.maximum(largest[name], reach) if name in largest else reach
                state.update(found)
    return largest
