"""A checkpoint with tensors and linears put over those of its folder; nothing is written, nothing is read yet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mixt_export.checkpoints.checkpoint import Checkpoint
from mixt_export.checkpoints.mixt import check_against_store
from mixt_export.checkpoints.store import StoredTensor, TensorStore
from mixt_export.network import FactorizedLinear, TensorRef


@dataclass(frozen=True, slots=True)
class Made:
    """A virtual tensor: numpy dtype name and shape now, its value when ``make()`` is called.

    ``make()`` gives a new array of ``shape`` in float64 (rounded to ``dtype`` by the store) or in ``dtype``. It is
    called at every read and must give the same numbers each time; whoever makes it keeps no large result in memory.
    """

    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray[Any, Any]]


def overlaid(
    checkpoint: Checkpoint,
    tensors: Mapping[str, Made],
    factors: Mapping[str, FactorizedLinear] | None = None,
) -> Checkpoint:
    """``checkpoint`` with ``tensors`` replaced or added by name and the linears of ``factors`` replaced or added.

    A linear that is factorised now loses its dense weight; cores that no linear uses any more are dropped. Every reader
    of the store sees the overlaid values; ``checkpoint.path`` still names the folder with config.json and companions.
    An overlay may be laid over an overlay.

    Raises CheckpointError when a linear names a tensor that is nowhere, NetworkError when one has another shape or
    dtype than a linear that uses it says.
    """
    new = dict(factors or {})
    every = {**checkpoint.factors, **new}
    before = _cores(checkpoint.factors)
    dropped = {f"{name}.weight" for name in new} | (before - _cores(every))
    kept = {name: stored for name, stored in checkpoint.store.items() if name not in dropped - set(tensors)}
    for name, made in tensors.items():
        ref = TensorRef(name, tuple(made.shape), made.dtype)
        found = checkpoint.store.get(name)
        place = checkpoint.path if found is None else found.path
        kept[name] = StoredTensor(ref, place, 0, ref.nbytes, made.make)
    store = TensorStore(kept)
    check_against_store(every, store, str(checkpoint.path))
    return replace(checkpoint, store=store, factors=every)


def _cores(factors: Mapping[str, FactorizedLinear]) -> set[str]:
    """Names of the tensors of ``factors``, biases apart: a bias belongs to its linear whatever its factors are."""
    return {ref.name for linear in factors.values() for ref in linear.tensors() if ref != linear.bias}
