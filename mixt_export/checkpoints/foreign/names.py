"""Names of the tensors of a folder, for formats that only these give away."""

from __future__ import annotations

from pathlib import Path

from mixt_export.checkpoints import paths, strictjson
from mixt_export.checkpoints.header import read_header
from mixt_export.checkpoints.store import INDEX_FILE, SINGLE_FILE
from mixt_export.checkpoints.weights import PICKLE_INDEX, SINGLE_PICKLE, pickled_tensors, weights_file


def stored_names(folder: Path) -> tuple[str, ...]:
    """Names of all tensors, from an index where there is one, else from the header; () for a folder without weights.

    Raises CheckpointError or UnsupportedError where the file cannot be read.
    """
    name = weights_file(folder)
    path = None if name is None else paths.own_file(folder, name)
    if name is None or path is None:
        return ()
    if name in (INDEX_FILE, PICKLE_INDEX):
        weight_map = strictjson.load_object(path).get("weight_map")
        return tuple(map(str, weight_map)) if isinstance(weight_map, dict) else ()
    if name == SINGLE_PICKLE:
        return tuple(pickled_tensors(path))
    assert name == SINGLE_FILE
    return tuple(read_header(path).entries)
