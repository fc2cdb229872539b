"""Store low rank factors in parts, 8 bits and 16 (see checkpoints.packed): Dobi-SVD's remapping as an option."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np

from mixt_export.checkpoints import NewTensor
from mixt_export.checkpoints.packed import SCHEME, Packed
from mixt_export.compression.job import Result
from mixt_export.compression.report import LayerReport
from mixt_export.network import FactorizedLinear

#: Values of --store.
STORES = (SCHEME,)


def rank_price(out_features: int, in_features: int) -> int:
    """What one rank takes, in numbers of 16 bits: min(m, n) rows of both factors in 8 bits, the others in 16."""
    return max(out_features, in_features)


def remapped(result: Result) -> Result:
    """``result`` with the cores of its low rank linears in parts, and what that does to each layer's report.

    The factors' values are produced once more for the error.
    """
    made = {tensor.name: tensor for tensor in result.tensors}
    packed: dict[str, Packed] = {}
    layers: list[LayerReport] = []
    for layer in result.layers:
        linear = result.factors.get(layer.name)
        if linear is None:
            layers.append(layer)
            continue
        pair = _pair(linear)
        packed |= {item.ref.name: item for item in pair}
        params = rank_price(layer.out_features, layer.in_features) * (layer.rank or 0)
        layers.append(
            replace(
                layer,
                params=params,
                kept=params / (layer.out_features * layer.in_features),
                stored_bytes=sum(item.nbytes for item in pair),
                stored_error=_error(pair, made),
            )
        )
    tensors = [tensor for tensor in result.tensors if tensor.name not in packed]
    for name, item in packed.items():
        tensors.extend(_parts(item, made[name]))
    return replace(result, layers=tuple(layers), tensors=tensors, packed=packed)


def _pair(linear: FactorizedLinear) -> tuple[Packed, Packed]:
    """The cores (in, rank) and (rank, out)."""
    first, second = (core.tensor for core in linear.branches[0].cores)
    rows = min(linear.in_features, linear.out_features)
    return Packed(first, 0, rows), Packed(second, 1, rows)


def _parts(item: Packed, source: NewTensor) -> list[NewTensor]:
    """The parts of one core; its values are produced for the first of them and dropped with the last."""

    @cache
    def arrays() -> list[np.ndarray[Any, Any]]:
        return item.pack(source.produce())

    def produce(number: int) -> np.ndarray[Any, Any]:
        array = arrays()[number]
        if number == len(item.parts) - 1:
            arrays.cache_clear()
        return array

    return [
        NewTensor(ref.name, ref.dtype, ref.shape, partial(produce, number)) for number, ref in enumerate(item.parts)
    ]


def _error(pair: tuple[Packed, Packed], made: Mapping[str, NewTensor]) -> float:
    """||W' - Ŵ'||_F / ||W'||_F of the product before and after packing, from the factors' Grams."""
    before = [made[item.ref.name].produce().astype(np.float64) for item in pair]
    after = [item.unpack(item.pack(values)) for item, values in zip(pair, before, strict=True)]

    def inner(left: list[np.ndarray[Any, Any]], right: list[np.ndarray[Any, Any]]) -> float:
        return float(((left[0].T @ right[0]) * (left[1] @ right[1].T)).sum())

    energy = inner(before, before)
    square = energy - 2.0 * inner(before, after) + inner(after, after)
    return (max(square, 0.0) / energy) ** 0.5 if energy > 0 else 0.0
