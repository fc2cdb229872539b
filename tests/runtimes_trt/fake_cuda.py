"""A CUDA runtime on the CPU: device memory is host memory, a stream runs at once, a graph is a list of calls.

Fresh memory is full of NaN, and a copy outside of what was allocated fails, so that a runner's mistakes show.
"""

# ruff: noqa: N802 - the names are CUDA's
from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

OUT_OF_MEMORY, BAD_ARGUMENT, NOT_CAPTURABLE = 2, 1, 900


class FakeCudart:
    """The functions of libcudart that mixt_trt/cuda.py calls. ``capability``: of the pretended GPU."""

    def __init__(self, *, capability: int = 87, total: int = 1 << 30, capturable: bool = True) -> None:
        self.capability, self.total, self.capturable = capability, total, capturable
        self.buffers: dict[int, Any] = {}
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.captured: list[Callable[[], None]] | None = None
        self.launches = 0
        self._handles = 100
        for name in [name for name in dir(self) if name.startswith("_cuda")]:
            # ctypes functions carry argtypes; bound methods cannot, functions can.
            method = getattr(self, name)
            setattr(self, name[1:], lambda *arguments, method=method: method(*arguments))

    @property
    def used(self) -> int:
        return sum(len(buffer) for buffer in self.buffers.values())

    def submit(self, work: Callable[[], None]) -> None:
        """Run ``work``, or record it while a capture is on."""
        if self.captured is None:
            work()
        else:
            self.captured.append(work)

    def _handle(self, pointer: Any) -> int:
        self._handles += 1
        pointer._obj.value = self._handles
        return self._handles

    def inside(self, address: int, nbytes: int) -> bool:
        return any(start <= address and address + nbytes <= start + len(b) for start, b in self.buffers.items())

    def _cudaMalloc(self, pointer: Any, nbytes: int) -> int:
        if self.used + nbytes > self.total:
            return OUT_OF_MEMORY
        buffer = ctypes.create_string_buffer(b"\xff" * nbytes, nbytes)
        pointer._obj.value = ctypes.addressof(buffer)
        self.buffers[ctypes.addressof(buffer)] = buffer
        return 0

    def _cudaFree(self, address: int) -> int:
        return 0 if self.buffers.pop(address, None) is not None else BAD_ARGUMENT

    def _cudaMemsetAsync(self, address: int, value: int, nbytes: int, stream: int) -> int:
        if not self.inside(address, nbytes):
            return BAD_ARGUMENT
        self.submit(lambda: ctypes.memset(address, value, nbytes) and None)
        return 0

    def _cudaMemcpyAsync(self, target: int, source: int, nbytes: int, kind: int, stream: int) -> int:
        on_device = target if kind == 1 else source
        if not self.inside(on_device, nbytes) or self.captured is not None:
            return BAD_ARGUMENT
        ctypes.memmove(target, source, nbytes)
        return 0

    def _cudaMemcpy2DAsync(
        self, target: int, tpitch: int, source: int, spitch: int, width: int, rows: int, kind: int, stream: int
    ) -> int:
        spans = (target, (rows - 1) * tpitch + width), (source, (rows - 1) * spitch + width)
        if kind != 3 or width > min(tpitch, spitch) or not all(self.inside(*span) for span in spans):
            return BAD_ARGUMENT

        def copy() -> None:
            for row in range(rows):
                ctypes.memmove(target + row * tpitch, source + row * spitch, width)

        self.submit(copy)
        return 0

    def _cudaStreamCreate(self, pointer: Any) -> int:
        self._handle(pointer)
        return 0

    def _cudaStreamSynchronize(self, stream: int) -> int:
        return 0 if self.captured is None else NOT_CAPTURABLE

    def _cudaStreamBeginCapture(self, stream: int, mode: int) -> int:
        self.captured = []
        return 0

    def _cudaStreamEndCapture(self, stream: int, pointer: Any) -> int:
        work, self.captured = self.captured, None
        if not self.capturable or not work:
            return NOT_CAPTURABLE
        self.graphs[self._handle(pointer)] = work
        return 0

    def _cudaGraphInstantiateWithFlags(self, pointer: Any, graph: int, flags: int) -> int:
        self.graphs[self._handle(pointer)] = list(self.graphs[graph])
        return 0

    def _cudaGraphLaunch(self, graph: int, stream: int) -> int:
        self.launches += 1
        for work in self.graphs[graph]:
            work()
        return 0

    def _cudaGraphDestroy(self, graph: int) -> int:
        del self.graphs[graph]
        return 0

    def _cudaGraphExecDestroy(self, graph: int) -> int:
        del self.graphs[graph]
        return 0

    def _cudaMemGetInfo(self, free: Any, total: Any) -> int:
        free._obj.value, total._obj.value = self.total - self.used, self.total
        return 0

    def _cudaGetDevice(self, pointer: Any) -> int:
        pointer._obj.value = 0
        return 0

    def _cudaDeviceGetAttribute(self, pointer: Any, attribute: int, device: int) -> int:
        pointer._obj.value = {75: self.capability // 10, 76: self.capability % 10}[attribute]
        return 0
