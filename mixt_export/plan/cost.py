"""What a form costs on a device: arithmetic, reading weights, moving activations, starting operators.

The constants are data. Those of the CPU were fitted to ONNX Runtime 1.31, one thread of a Xeon with AVX-512: how many
times faster than dense every form was, N = 2 … 5 terms, 576x192 to 4096x11008, 1, 16 and 128 rows (774 ratios; see
benchmarks/mixt_linear.py). Taking the sum of arithmetic and reading instead of the larger of the two halves the error;
products from the right are predicted within 10 % (root mean square). Only ratios were fitted: ``flops`` sets the unit.
"""

from __future__ import annotations

from dataclasses import dataclass

from mixt_export.plan.forms import Form


@dataclass(frozen=True, slots=True)
class Device:
    """Constants of one execution thread. Rates are per second."""

    name: str
    flops: float
    """Floating-point operations of matrix products (one multiply-add is two)."""
    bandwidth: float
    """Bytes of weights read from memory."""
    left: float
    """Share of that bandwidth that a weight on the left of a product reaches: the runtime does not prepack it."""
    movement: float
    """Bytes of activations read and written by transposes, sums and padding, while an activation fits ``cache``."""
    far: float
    """The same for larger activations."""
    cache: int
    """Bytes of an activation up to which it stays near."""
    node: float
    """Seconds to start one operator."""


CPU = Device("cpu", flops=78e9, bandwidth=18e9, left=0.45, movement=15e9, far=7e9, cache=1_500_000, node=1e-6)

_ITEM = 4
"""Bytes of an activation and of a weight in use: the CPU computes in float32 whatever the graph's dtype."""


def seconds(form: Form, rows: int, device: Device = CPU) -> float:
    """Predicted time of ``form`` for ``rows`` tokens with float32 weights."""
    bandwidth = device.bandwidth * (device.left if form.layout == "left" else 1.0)
    products = 2 * form.macs * rows / device.flops + _ITEM * form.elements / bandwidth
    moved = 2 * form.transposed_features + 3 * (len(form.windows) - 1) * form.out_features
    if form.padded:
        moved += sum(form.in_features + window.in_size + window.out_size + form.out_features for window in form.windows)
    near = _ITEM * rows * max(form.in_features, form.out_features) <= device.cache
    rate = device.movement if near else device.far
    return products + _ITEM * moved * rows / rate + form.nodes * device.node
