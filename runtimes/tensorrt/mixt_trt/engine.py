"""A loaded engine: one context, one stream, inputs and outputs by device address."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from .backends import Backend
from .cuda import Cuda
from .errors import NotSupportedError, OutOfMemoryError, TrtError
from .log import Log, make_logger
from .manifest import Manifest, Shape
from .stamp import Stamp, find_engine, load_plan


class Engine:
    """The engine of ``manifest`` for this library and GPU. Raises TrtError when there is none that fits.

    ``layers``: the engine that also puts out every block (build_engine.py --layer-outputs).
    """

    def __init__(self, manifest: Manifest, backend: Backend, module: Any, cuda: Cuda, *, layers: bool = False) -> None:
        library, sm = str(module.__version__), cuda.compute_capability()
        folder = find_engine(manifest, backend, library, sm, layers)
        self.stamp: Stamp
        self.stamp, plan = load_plan(manifest, folder, backend, library, sm)
        self.cuda = cuda
        self.stream = cuda.stream()
        self._module = module
        self._log = Log()
        self._logger = make_logger(module, self._log)
        self._runtime = module.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise self._failed(folder, "cannot load the engine")
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise self._failed(folder, "cannot make an execution context")
        self._profile = -1
        self.names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        self.outputs = [name for name in self.names if self._is_output(name)]
        absent = sorted(set(self.stamp.layer_outputs) - set(self.outputs))
        if absent:
            raise TrtError(f"{folder}: its stamp names an output {absent[0]!r} that the engine lacks; build it again.")

    def admits(self, shapes: Mapping[str, Shape]) -> bool:
        """Whether some profile admits ``shapes``."""
        return any(profile.admits(shapes) for profile in self.stamp.profiles)

    def profile_for(self, shapes: Mapping[str, Shape]) -> int:
        """The narrowest profile that admits ``shapes``. Raises TrtError when none does."""
        for index in range(len(self.stamp.profiles) - 1, -1, -1):
            if self.stamp.profiles[index].admits(shapes):
                return index
        lengths = {name: list(shape) for name, shape in shapes.items() if not name.startswith("past_key_values.")}
        raise TrtError(
            f"no profile of this engine admits {lengths}; give a shorter prompt or export with larger limits."
        )

    def prepare(self, shapes: Mapping[str, Shape], addresses: Mapping[str, int]) -> None:
        """Set profile, input shapes and the address of every input and output for the next runs."""
        index = self.profile_for(shapes)
        if index != self._profile:
            self._check(self._context.set_optimization_profile_async(index, self.stream), f"select profile {index}")
            self.cuda.synchronize(self.stream)
            self._profile = index
        for name, shape in shapes.items():
            self._check(self._context.set_input_shape(name, shape), f"set the shape of {name}")
        for name, address in addresses.items():
            self._check(self._context.set_tensor_address(name, address), f"set the address of {name}")

    def shape(self, name: str) -> Shape:
        """Shape of an input or output under the shapes that ``prepare`` set."""
        return tuple(int(size) for size in self._context.get_tensor_shape(name))

    def dtype(self, name: str) -> str:
        """``FLOAT``, ``HALF``, ``BF16``, ``INT64`` …"""
        return str(self._engine.get_tensor_dtype(name)).rpartition(".")[2]

    def elements(self, name: str) -> int:
        """Number of elements of an input or output under the shapes that ``prepare`` set."""
        return prod(self.shape(name))

    def enqueue(self) -> None:
        """Queue one run in ``stream``."""
        self._check(self._context.execute_async_v3(self.stream), "run the engine")

    def _is_output(self, name: str) -> bool:
        return bool(self._engine.get_tensor_mode(name) == self._module.TensorIOMode.OUTPUT)

    def _check(self, done: bool, what: str) -> None:
        if not done:
            raise self._failed(Path(self.stamp.backend), f"cannot {what}")

    def _failed(self, where: Path, what: str) -> TrtError:
        said = " | ".join(" ".join(text.split()) for text in self._log.errors[-2:]) or "it does not say why"
        kind = OutOfMemoryError if "memory" in said.lower() else NotSupportedError
        return kind(f"{where}: TensorRT {what} ({said}).")
