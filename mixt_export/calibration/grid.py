"""The operators that a calibration measures: shapes spread evenly on a logarithmic scale, the same on every machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import log2

from mixt_export.calibration.probe import Probe, moving
from mixt_export.plan.operations import Kind, Operation

_TOKENS = (1, 1, 16, 128)
"""Tokens of the probes in turn: generating one by one is what a device does most."""

_MOST_MACS, _MOST_NUMBERS, _MOST_WEIGHTS = 4e8, 6e6, 3e6
"""Limits on one operator, so that all of them take about a minute."""

COUNTS: dict[Kind, int] = {
    "right": 64,
    "left": 40,
    "batched": 28,
    "transpose": 24,
    "elementwise": 8,
    "pad": 4,
    "reshape": 4,
}
"""Probes of each kind."""


def grid(share: float = 1.0) -> list[Probe]:
    """All probes, or about a ``share`` of each kind."""
    return [
        probe for kind, count in COUNTS.items() for probe in _kind(kind, max(1, round(share * count)), _SHAPES[kind])
    ]


def _kind(kind: Kind, count: int, shape: Callable[[tuple[float, ...]], Operation]) -> Iterator[Probe]:
    found, index = 0, 0
    while found < count:
        index += 1
        probe = Probe(shape(tuple(_halton(index, base) for base in (2, 3, 5, 7))), _TOKENS[found % len(_TOKENS)])
        if _affordable(probe):
            found += 1
            yield probe


def _affordable(probe: Probe) -> bool:
    operation, tokens = probe.operation, probe.tokens
    numbers = operation.moved or operation.batch * operation.rows * (operation.inner + operation.columns)
    return (
        tokens * operation.macs <= _MOST_MACS
        and tokens * numbers <= _MOST_NUMBERS
        and operation.weights <= _MOST_WEIGHTS
    )


def _right(at: tuple[float, ...]) -> Operation:
    inner, columns = _size(at[0], 8, 4096), _size(at[1], 8, 4096)
    rows = 1 if at[2] < 0.5 else _size(2 * at[2] - 1, 2, 512)
    return Operation("right", 1, rows, inner, columns, inner * columns)


def _left(at: tuple[float, ...]) -> Operation:
    inner, columns, rows = _size(at[0], 4, 1024), _size(at[1], 4, 1024), _size(at[2], 8, 1024)
    batch = 1 if at[3] < 0.4 else _size((at[3] - 0.4) / 0.6, 2, 256)
    return Operation("left", batch, rows, inner, columns, inner * columns, tokens="batch")


def _batched(at: tuple[float, ...]) -> Operation:
    inner, columns, batch = _size(at[0], 8, 1024), _size(at[1], 8, 1024), _size(at[2], 2, 64)
    rows = 1 if at[3] < 0.6 else _size((at[3] - 0.6) / 0.4, 2, 64)
    return Operation("batched", batch, rows, inner, columns, batch * inner * columns)


def _moves(kind: Kind) -> Callable[[tuple[float, ...]], Operation]:
    def shape(at: tuple[float, ...]) -> Operation:
        inner = _size(at[2], 2, 64)
        if kind == "transpose" and at[2] < 0.7:
            inner = 0 if at[2] < 0.4 else 1
        return moving(kind, _size(at[0], 4, 512), inner, _size(at[1], 4, 512))

    return shape


_SHAPES: dict[Kind, Callable[[tuple[float, ...]], Operation]] = {
    "right": _right,
    "left": _left,
    "batched": _batched,
    "transpose": _moves("transpose"),
    "elementwise": _moves("elementwise"),
    "pad": _moves("pad"),
    "reshape": _moves("reshape"),
}


def _size(at: float, least: int, most: int) -> int:
    """``at`` in 0 … 1 on a logarithmic scale; from 16 on a multiple of 8, as the sizes of models are."""
    size = round(2 ** (log2(least) + at * (log2(most) - log2(least))))
    return size if size < 16 else 8 * round(size / 8)


def _halton(index: int, base: int) -> float:
    """Number ``index`` of the low-discrepancy sequence of van der Corput in ``base``."""
    value, share = 0.0, 1.0
    while index:
        share /= base
        index, digit = divmod(index, base)
        value += share * digit
    return value
