"""The few calls of the CUDA runtime that running an engine needs, through ctypes: no package to install.

``Cuda(library)`` takes the loaded libcudart, so that tests can put one in its place.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy.typing as npt

from .errors import MissingLibraryError, OutOfMemoryError, TrtError

_LIBRARIES = ("libcudart.so", "libcudart.so.13", "libcudart.so.12", "/usr/local/cuda/lib64/libcudart.so")
_TO_DEVICE, _TO_HOST, _ON_DEVICE = 1, 2, 3
_MAJOR, _MINOR = 75, 76
_OUT_OF_MEMORY = 2
_NO_DEVICE = frozenset({35, 100, 101})
_THREAD_LOCAL_CAPTURE = 1

_P, _S, _I = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
#: Function -> types of its arguments, as the CUDA runtime's header declares them (the same in CUDA 11.4 to 13).
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cudaMalloc": (_P, _S),
    "cudaFree": (_P,),
    "cudaMemsetAsync": (_P, _I, _S, _P),
    "cudaMemcpyAsync": (_P, _P, _S, _I, _P),
    "cudaMemcpy2DAsync": (_P, _S, _P, _S, _S, _S, _I, _P),
    "cudaStreamCreate": (_P,),
    "cudaStreamSynchronize": (_P,),
    "cudaStreamBeginCapture": (_P, _I),
    "cudaStreamEndCapture": (_P, _P),
    "cudaGraphInstantiateWithFlags": (_P, _P, ctypes.c_ulonglong),
    "cudaGraphLaunch": (_P, _P),
    "cudaGraphDestroy": (_P,),
    "cudaGraphExecDestroy": (_P,),
    "cudaMemGetInfo": (_P, _P),
    "cudaGetDevice": (_P,),
    "cudaDeviceGetAttribute": (_P, _I, _I),
}


def open_cuda() -> Cuda:
    """The CUDA runtime of this machine. Raises MissingLibraryError when it is not there or finds no GPU."""
    for name in _LIBRARIES:
        try:
            return Cuda(ctypes.CDLL(name))
        except OSError:
            continue
    raise MissingLibraryError(
        "the CUDA runtime (libcudart) is not installed: on a Jetson `sudo apt-get install nvidia-jetpack`, on a "
        "workstation `pip install nvidia-cuda-runtime` and its folder in LD_LIBRARY_PATH."
    )


class Cuda:
    """Device memory, one stream's worth of copies, and graphs. Addresses and handles are integers."""

    def __init__(self, library: Any) -> None:
        self._library = library
        for name, types in _SIGNATURES.items():
            getattr(library, name).argtypes = list(types)
        self._graphs: list[int] = []

    def compute_capability(self) -> int:
        """That of the current GPU: 87 for Orin, 110 for Thor."""
        device = ctypes.c_int()
        self._call("cudaGetDevice", ctypes.byref(device))
        numbers = []
        for attribute in (_MAJOR, _MINOR):
            value = ctypes.c_int()
            self._call("cudaDeviceGetAttribute", ctypes.byref(value), attribute, device.value)
            numbers.append(value.value)
        return 10 * numbers[0] + numbers[1]

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes of device memory; on a Jetson that is the memory of the whole board."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def allocate(self, nbytes: int) -> int:
        """Address of ``nbytes`` (at least one) of device memory. Raises OutOfMemoryError."""
        address = ctypes.c_void_p()
        self._call("cudaMalloc", ctypes.byref(address), max(nbytes, 1))
        return int(address.value or 0)

    def free(self, address: int) -> None:
        """Give back what ``allocate`` returned."""
        self._call("cudaFree", address)

    def stream(self) -> int:
        """A new stream."""
        handle = ctypes.c_void_p()
        self._call("cudaStreamCreate", ctypes.byref(handle))
        return int(handle.value or 0)

    def synchronize(self, stream: int) -> None:
        """Wait until everything queued in ``stream`` is done."""
        self._call("cudaStreamSynchronize", stream)

    def zero(self, address: int, nbytes: int, stream: int) -> None:
        """Queue: fill with zeros."""
        if nbytes:
            self._call("cudaMemsetAsync", address, 0, nbytes, stream)

    def upload(self, address: int, values: npt.NDArray[Any], stream: int) -> None:
        """Copy a contiguous array to the device and wait, so that ``values`` may be reused."""
        if values.nbytes:
            self._call("cudaMemcpyAsync", address, values.ctypes.data, values.nbytes, _TO_DEVICE, stream)
            self.synchronize(stream)

    def download(self, values: npt.NDArray[Any], address: int, stream: int) -> None:
        """Copy from the device into a contiguous array and wait."""
        if values.nbytes:
            self._call("cudaMemcpyAsync", values.ctypes.data, address, values.nbytes, _TO_HOST, stream)
        self.synchronize(stream)

    def copy_rows(
        self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, rows: int, stream: int
    ) -> None:
        """Queue: copy ``rows`` pieces of ``width`` bytes that lie a pitch apart, on the device."""
        if width and rows:
            self._call("cudaMemcpy2DAsync", target, target_pitch, source, source_pitch, width, rows, _ON_DEVICE, stream)

    def begin_capture(self, stream: int) -> None:
        """Record what is queued from now on instead of running it."""
        self._call("cudaStreamBeginCapture", stream, _THREAD_LOCAL_CAPTURE)

    def end_capture(self, stream: int) -> int:
        """The recorded graph, ready to launch. Raises TrtError when something queued cannot be recorded."""
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cudaStreamEndCapture", stream, ctypes.byref(graph))
        self._call("cudaGraphInstantiateWithFlags", ctypes.byref(executable), graph.value, 0)
        self._call("cudaGraphDestroy", graph.value)
        return int(executable.value or 0)

    def launch(self, graph: int, stream: int) -> None:
        """Queue a recorded graph."""
        self._call("cudaGraphLaunch", graph, stream)

    def free_graph(self, graph: int) -> None:
        """Give back what ``end_capture`` returned."""
        self._call("cudaGraphExecDestroy", graph)

    def _call(self, name: str, *arguments: Any) -> None:
        code = int(getattr(self._library, name)(*arguments))
        if code == _OUT_OF_MEMORY:
            free, total = self.memory()
            raise OutOfMemoryError(
                f"{name}: out of device memory ({free / 1e6:.0f} of {total / 1e6:.0f} MB free); stop other programs or "
                "export with a smaller --max-seq-len."
            )
        if code in _NO_DEVICE:
            raise MissingLibraryError(f"{name}: CUDA finds no GPU or no driver here (error {code}).")
        if code:
            raise TrtError(f"{name}: CUDA error {code}; see the CUDA runtime's list of errors.")
