"""What a form costs on a GPU that runs one kernel after the other: a model of published figures, nothing measured.

    seconds(kernel) = max(bytes / (0.75 · bandwidth), 2 · multiply-adds / (0.55 · peak)) + launch

(roofline: Williams et al., CACM 52(4), 2009). Multiply-adds are those of whole tensor-core tiles: a product with 4
columns takes as long as one with 8. Weights come from memory once per kernel. Activations do so where a kernel starts
from the linear's input or ends at its output, and between kernels once they outgrow half of the second-level cache;
smaller ones are read at the cache's rate. A Reshape is free; everything else is a kernel, because what TensorRT fuses
of transposes and sums cannot be known without the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mixt_export.plan.operations import PRODUCTS, Operation

#: Shares of bandwidth and of peak that good kernels reach. Assumptions.
REACHED_BANDWIDTH, REACHED_PEAK = 0.75, 0.55

#: Rate of the second-level cache, in multiples of the memory bandwidth reached: 450 GB/s on an AGX Orin. An assumption.
CACHE_RATE = 2.9

#: Seconds to start a kernel of a recorded CUDA graph; 5 to 10 µs without one. An assumption.
LAUNCH = 3e-6

#: Sides of the smallest tensor-core product of 16-bit numbers, in either orientation (PTX ISA, mma.m16n8k16).
_TILE, _NARROW = 16, 8


@dataclass(frozen=True, slots=True)
class Gpu:
    """A device of `targets.devices` as the planner sees it. ``bandwidth`` in bytes/s, ``flops`` tensor operations/s.

    ``cache``: bytes of the second-level cache; ``processors``: streaming multiprocessors; ``item``: bytes of a weight
    and of an activation; ``launch``: seconds to start a kernel.
    """

    name: str
    bandwidth: float
    flops: float
    cache: int
    processors: int
    item: int = 2
    launch: float = LAUNCH

    def seconds(self, operations: Sequence[Operation], tokens: int) -> float:
        """Predicted time of ``operations``, one kernel each, for ``tokens`` tokens in one run."""
        kernels = [operation for operation in operations if operation.kind != "reshape"]
        last = len(kernels) - 1
        return sum(
            self._kernel(operation, tokens, first=index == 0, last=index == last)
            for index, operation in enumerate(kernels)
        )

    def moving(self, nbytes: float, macs: float = 0.0) -> float:
        """A kernel that moves ``nbytes`` from and to memory and computes ``macs`` multiply-adds at full tiles."""
        return max(nbytes / (REACHED_BANDWIDTH * self.bandwidth), 2 * macs / (REACHED_PEAK * self.flops)) + self.launch

    def near(self, nbytes: float) -> float:
        """Seconds to read or write ``nbytes`` in the second-level cache."""
        return nbytes / (CACHE_RATE * REACHED_BANDWIDTH * self.bandwidth)

    def _kernel(self, operation: Operation, tokens: int, *, first: bool, last: bool) -> float:
        source, result = (self.item * count * tokens for count in _activations(operation))
        memory = float(self.item * operation.weights)
        cached = 0.0
        for nbytes, outside in ((source, first), (result, last)):
            if outside or nbytes > self.cache / 2:
                memory += nbytes
            else:
                cached += nbytes
        return max(self.moving(memory, tile_macs(operation, tokens)), self.near(cached) + self.launch)


def tile_macs(operation: Operation, tokens: int) -> int:
    """Multiply-adds that the tensor cores execute: every side rounded up to whole tiles."""
    if operation.kind not in PRODUCTS:
        return 0
    if operation.kind == "fused":
        return operation.macs * tokens
    wide = operation.tokens == "rows"
    products, rows = (operation.batch, tokens * operation.rows) if wide else (tokens * operation.batch, operation.rows)
    inner = _up(operation.inner, _TILE)
    upright = _up(rows, _TILE) * _up(operation.columns, _NARROW)
    across = _up(rows, _NARROW) * _up(operation.columns, _TILE)
    return products * inner * min(upright, across)


def _activations(operation: Operation) -> tuple[float, float]:
    """Numbers per token that an operation reads and writes."""
    if operation.kind in ("right", "left", "batched"):
        rows = operation.batch * operation.rows
        return rows * operation.inner, rows * operation.columns
    if operation.kind == "elementwise":  # two operands, one result
        return 2 * operation.moved / 3, operation.moved / 3
    return operation.moved / 2, operation.moved / 2


def _up(size: int, tile: int) -> int:
    return -(-size // tile) * tile
