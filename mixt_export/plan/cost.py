"""What a form costs on a device: every operator's work by kind, times the device's seconds per unit.

The model is linear in the device's constants, so that measurements of single operators determine them by least squares
(`calibration.fit`). A matrix product of m rows, k inner and n columns is what MLAS, ONNX Runtime's CPU library, makes
of it: tiles of a few rows times `Device.tile` columns, the right-hand matrix in panels of tiles. Where that matrix is a
weight known ahead (``right``) the panels are packed once and only stream; where it is an activation (``left``) or a
stack of weights (``batched``) they are packed in every run, unless the product has a single row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from mixt_export.plan.devices import CPU, NUMBER, Device
from mixt_export.plan.gpu import Gpu
from mixt_export.plan.operations import Kind, Operation

if TYPE_CHECKING:
    from mixt_export.plan.forms import Form

__all__ = ["CPU", "Device", "amounts", "operation_seconds", "seconds"]


def seconds(form: Form, rows: int, device: Device | Gpu = CPU) -> float:
    """Predicted time of ``form`` for ``rows`` tokens in one run."""
    if isinstance(device, Gpu):
        return device.seconds(form.operations, rows)
    return sum(operation_seconds(operation, rows, device) for operation in form.operations)


def operation_seconds(operation: Operation, tokens: int, device: Device = CPU) -> float:
    """Predicted time of one operator for ``tokens`` tokens."""
    found = amounts(operation, tokens, device)
    return sum(amount * float(getattr(device, name)) for name, amount in found.items())


def amounts(operation: Operation, tokens: int, device: Device) -> dict[str, float]:
    """How much of each constant of `Device` the operator takes, by the constant's name."""
    found = {"node": 1.0, **_WORK[operation.kind](operation, tokens, device)}
    return {name: amount for name, amount in found.items() if amount}


def _right(operation: Operation, tokens: int, device: Device) -> dict[str, float]:
    rows, inner, columns = tokens * operation.rows, operation.inner, operation.columns
    return {
        **_kernel(1, rows, inner, columns, device),
        **_far("read", rows * inner, device),
        "stream": inner * _tiles(columns, device),
    }


def _left(operation: Operation, tokens: int, device: Device) -> dict[str, float]:
    folded = operation.tokens == "rows"
    calls = operation.batch * (1 if folded else tokens)
    columns = operation.rows * (tokens if folded else 1)
    rows, inner = operation.columns, operation.inner
    packed = _far("pack", calls * inner * columns, device)
    padding = _tiles(columns, device) / columns
    again = calls if NUMBER * operation.weights > device.cache else 1  # weights beyond the cache are read per product
    return {
        **_kernel(calls, rows, inner, columns, device),
        **{name: amount * padding for name, amount in packed.items()},
        "call": calls,
        "stream": operation.weights * again,
    }


def _batched(operation: Operation, tokens: int, device: Device) -> dict[str, float]:
    calls, rows, inner, columns = operation.batch, tokens * operation.rows, operation.inner, operation.columns
    return {
        **_kernel(calls, rows, inner, columns, device),
        **_far("read", calls * rows * inner, device),
        "call": calls,
        "stack" if rows == 1 else "stack_packed": calls * inner * _tiles(columns, device),
    }


def _kernel(calls: int, rows: int, inner: int, columns: int, device: Device) -> dict[str, float]:
    """``calls`` products (rows, inner) x (inner, columns) of matrices in reach."""
    panels = calls * inner * _tiles(columns, device)
    return {
        "mac": rows * panels,
        "row": calls * rows,
        **_far("write", calls * rows * columns, device),
    }


def _transpose(operation: Operation, tokens: int, device: Device) -> dict[str, float]:
    numbers = tokens * operation.moved
    blocks = numbers / 2 / operation.inner if operation.inner else 0.0
    return {"scatter" if operation.inner == 1 else "block": blocks, **_far("transpose", numbers, device)}


def _moving(name: str) -> Callable[[Operation, int, Device], dict[str, float]]:
    def work(operation: Operation, tokens: int, device: Device) -> dict[str, float]:
        return _far(name, tokens * operation.moved, device)

    return work


def _sparse(operation: Operation, tokens: int, device: Device) -> dict[str, float]:
    return {"gather": tokens * operation.weights, **_far("move", tokens * operation.moved, device)}


def _fused(operation: Operation, tokens: int, device: Device) -> dict[str, float]:
    return {
        "mac": tokens * operation.macs,
        "stream": operation.weights,
        **_far("move", tokens * operation.moved, device),
    }


def _nothing(_operation: Operation, _tokens: int, _device: Device) -> dict[str, float]:
    return {}


_WORK: Mapping[Kind, Callable[[Operation, int, Device], dict[str, float]]] = {
    "right": _right,
    "left": _left,
    "batched": _batched,
    "transpose": _transpose,
    "elementwise": _moving("move"),
    "pad": _moving("move"),
    "reshape": _nothing,
    "sparse": _sparse,
    "fused": _fused,
}


def _tiles(columns: int, device: Device) -> int:
    """``columns`` rounded up to whole tiles."""
    return -(-columns // device.tile) * device.tile


def _far(name: str, numbers: float, device: Device) -> dict[str, float]:
    """``numbers`` of one activation, those beyond the cache apart."""
    near = min(numbers, device.cache / NUMBER)
    return {name: near, f"{name}_far": numbers - near}
