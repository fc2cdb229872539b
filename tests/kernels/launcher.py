"""Load PTX and launch it on the GPU of this machine through libcuda, with what TensorRT passes: pointers and int32s."""

from __future__ import annotations

import ctypes
from typing import Any


class Driver:
    """libcuda on the current device of PyTorch, whose memory kernels use. Raises RuntimeError with its error code."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")

    def load(self, ptx: str, entry: str) -> ctypes.c_void_p:
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(ptx.encode()))
        self._call("cuModuleGetFunction", ctypes.byref(function), module, entry.encode())
        return function

    def launch(self, function: ctypes.c_void_p, grid: tuple[int, int, int], threads: int, shared: int,
               pointers: list[int], numbers: list[int], output: int, stream: int) -> None:  # fmt: skip
        values: list[Any] = [ctypes.c_uint64(pointer) for pointer in pointers]
        values += [ctypes.c_int32(number) for number in numbers] + [ctypes.c_uint64(output)]
        arguments = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        sizes = [ctypes.c_uint(size) for size in (*grid, threads, 1, 1, shared)]
        self._call("cuLaunchKernel", function, *sizes, ctypes.c_void_p(stream), arguments, None)

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            raise RuntimeError(f"{name} failed with CUDA error {code}")
