"""A ``tensorrt`` module for tests: the API of a real version, with ONNX Runtime as its core.

``fake_tensorrt("10.3", cudart)`` offers exactly the names that version's bindings have (tests/building/api) and counts
arguments; anything else is an AttributeError or TypeError, as on a board. A "plan" is the ONNX model with its weights.
"""

from __future__ import annotations

import ctypes
import enum
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from tests.runtimes_trt.fake_cuda import FakeCudart

API = Path(__file__).parent.parent / "building" / "api"
VERSIONS = {"10.3": "10.3.0", "10.16": "10.16.1.11", "11.4": "11.4.0.106"}
#: Highest opset each version's parser reads.
OPSETS = {"10.3": 20, "10.16": 23, "11.4": 25}
_ENUMS = (
    *("BuilderFlag", "DataType", "HardwareCompatibilityLevel", "MemoryPoolType", "NetworkDefinitionCreationFlag"),
    *("ProfilingVerbosity", "TensorIOMode"),
)
_DTYPES = {1: "FLOAT", 10: "HALF", 16: "BF16", 7: "INT64", 9: "BOOL"}
_NUMPY = {"FLOAT": np.float32, "HALF": np.float16, "INT64": np.int64}
_ORT = {"tensor(float)": "FLOAT", "tensor(float16)": "HALF", "tensor(int64)": "INT64"}


def names_of(version: str) -> dict[str, Any]:
    """What ``version``'s bindings offer, as recorded by tests/building/api/record.py."""
    return json.loads((API / f"tensorrt-{version}.json").read_text(encoding="utf-8"))


class Member(enum.Enum):
    """An enumerator of pybind11: int() works, str() is Kind.NAME."""

    def __int__(self) -> int:
        return int(self.value)


def fake_tensorrt(version: str, cudart: FakeCudart, **faults: Any) -> Any:
    """The module. ``faults``: messages ``build_warnings`` while building, ``build_error`` instead of a plan."""
    names = names_of(version)
    classes = names["classes"]
    module = SimpleNamespace(__version__=VERSIONS[version], _cudart=cudart, _faults=faults, _version=version)
    for kind in _ENUMS:
        members = [name for name in classes[kind] if name.isupper() or name[0].isupper()]
        setattr(module, kind, Member(kind, {name: index for index, name in enumerate(members)}))
    module.ILogger, module.IProgressMonitor = _Logger, _Monitor
    for owner, kind in {
        "Builder": _Builder,
        "INetworkDefinition": _Network,
        "IBuilderConfig": _Config,
        "IOptimizationProfile": _Profile,
        "OnnxParser": _Parser,
        "ParserError": _ParserError,
        "ILayer": _Layer,
        "ITensor": _Tensor,
        "ITimingCache": _TimingCache,
        "Runtime": _Runtime,
        "ICudaEngine": _Engine,
        "IExecutionContext": _Context,
    }.items():
        setattr(module, owner, _guarded(kind, owner, classes[owner], version, module))
    absent = {name for name in vars(module) if not name.startswith("_")} - set(names["module"])
    assert not absent, f"tensorrt {version} has no {absent}"
    return module


def _guarded(kind: type, owner: str, allowed: dict[str, Any], version: str, module: Any) -> type:
    """A subclass of ``kind`` that has only the names of ``allowed`` and checks how many arguments methods get."""

    def check(name: str) -> None:
        if not name.startswith("_") and name not in allowed:
            raise AttributeError(f"tensorrt {version}: {owner} has no attribute {name!r}")

    class Guarded(kind):  # type: ignore[misc]
        _module = module

        def __getattribute__(self, name: str) -> Any:
            check(name)
            value = super().__getattribute__(name)
            overloads = None if name.startswith("_") else allowed[name]
            if not callable(value) or overloads is None:
                return value

            def call(*arguments: Any) -> Any:
                if not any(least <= len(arguments) <= most for least, most in overloads):
                    raise TypeError(f"tensorrt {version}: {owner}.{name} takes {overloads} arguments, got {arguments}")
                return value(*arguments)

            return call

        def __setattr__(self, name: str, value: Any) -> None:
            check(name)
            super().__setattr__(name, value)

    return Guarded


class _Logger:
    def __init__(self) -> None:
        self._ready = True


class _Monitor:
    def __init__(self) -> None:
        self._ready = True


def _say(logger: Any, severity: str, text: str) -> None:
    assert logger._ready, "the logger's base class was not initialised"
    logger.log(f"Severity.{severity}", text)


class _Tensor:
    def __init__(self, name: str) -> None:
        self._name = name

    @property
    def name(self) -> str:
        return self._name


class _Layer:
    def __init__(self, tensors: list[Any]) -> None:
        self._tensors = tensors

    @property
    def num_outputs(self) -> int:
        return len(self._tensors)

    def get_output(self, index: int) -> Any:
        return self._tensors[index]


class _Network:
    def __init__(self, flags: int) -> None:
        self._flags = flags
        self._model: onnx.ModelProto | None = None

    @property
    def num_inputs(self) -> int:
        return len(self._model.graph.input)

    def get_input(self, index: int) -> Any:
        return self._module.ITensor(self._model.graph.input[index].name)

    @property
    def num_layers(self) -> int:
        return len(self._model.graph.node)

    def get_layer(self, index: int) -> Any:
        return self._module.ILayer([self._module.ITensor(name) for name in self._model.graph.node[index].output])

    def mark_output(self, tensor: Any) -> None:
        inferred = onnx.shape_inference.infer_shapes(self._model)
        (found,) = (value for value in inferred.graph.value_info if value.name == tensor.name)
        self._model.graph.output.append(found)


class _ParserError:
    def __init__(self, index: int, node: onnx.NodeProto, text: str) -> None:
        self._facts = index, node, text

    def node(self) -> int:
        return self._facts[0]

    def node_name(self) -> str:
        return self._facts[1].name

    def node_operator(self) -> str:
        return self._facts[1].op_type

    def desc(self) -> str:
        return self._facts[2]

    def local_function_stack(self) -> list[str]:
        return []

    def local_function_stack_size(self) -> int:
        return 0


class _Parser:
    def __init__(self, network: Any, logger: Any) -> None:
        self._network, self._logger = network, logger
        self._errors: list[Any] = []

    def parse_from_file(self, path: str) -> bool:
        model = onnx.load(path)
        opset = next(entry.version for entry in model.opset_import if entry.domain == "")
        for index, node in enumerate(model.graph.node):
            if node.op_type == "Attention" and len([name for name in node.output if name]) > 1:
                text = "Assertion failed: TensorRT only supports Attention nodes with one output"
                self._errors.append(self._module.ParserError(index, node, text))
        if opset > OPSETS[self._module._version]:
            text = f"opset {opset} is newer than {OPSETS[self._module._version]}"
            self._errors.append(self._module.ParserError(0, model.graph.node[0], text))
        self._network._model = model
        for text in self._module._faults.get("parse_warnings", ()):
            _say(self._logger, "WARNING", text)
        return not self._errors

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> Any:
        return self._errors[index]


class _Profile:
    def __init__(self) -> None:
        self._shapes: dict[str, Any] = {}

    def set_shape(self, name: str, low: Any, tuned: Any, high: Any) -> None:
        self._shapes[name] = [list(low), list(tuned), list(high)]


class _TimingCache:
    def __init__(self, data: bytes) -> None:
        self._data = data

    def serialize(self) -> bytes:
        return self._data + b"+"


class _Config:
    def __init__(self) -> None:
        self._profiles: list[Any] = []
        self._cleared: list[Any] = []
        self._flags: list[Any] = []
        self._pools: dict[Any, int] = {}
        self._cache: Any = None
        self.progress_monitor = None
        self.profiling_verbosity = None
        self.hardware_compatibility_level = None

    def add_optimization_profile(self, profile: Any) -> int:
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def clear_flag(self, flag: Any) -> None:
        self._cleared.append(flag)

    def set_flag(self, flag: Any) -> None:
        self._flags.append(flag)

    def set_memory_pool_limit(self, pool: Any, nbytes: int) -> None:
        self._pools[pool] = nbytes

    def create_timing_cache(self, data: bytes) -> Any:
        return self._module.ITimingCache(data)

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        if cache._data.startswith(b"other"):
            return False
        self._cache = cache
        return True


class HostMemory(bytes):
    """A serialised plan."""

    @property
    def nbytes(self) -> int:
        return len(self)


class _Builder:
    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def create_network(self, flags: int = 0) -> Any:
        if self._module._version.startswith("10."):
            strong = self._module.NetworkDefinitionCreationFlag.STRONGLY_TYPED
            assert flags & (1 << int(strong)), "a network of TensorRT 10 that is not strongly typed"
        return self._module.INetworkDefinition(flags)

    def create_builder_config(self) -> Any:
        return self._module.IBuilderConfig()

    def create_optimization_profile(self) -> Any:
        return self._module.IOptimizationProfile()

    def build_serialized_network(self, network: Any, config: Any) -> HostMemory | None:
        faults = self._module._faults
        for text in faults.get("build_warnings", ()):
            _say(self._logger, "WARNING", text)
        if "build_error" in faults:
            _say(self._logger, "ERROR", faults["build_error"])
            return None
        monitor = config.progress_monitor
        monitor.phase_start("Building", None, 2)
        for step in range(2):
            if not monitor.step_complete("Building", step):
                return None
        monitor.phase_finish("Building")
        facts = {
            "version": self._module.__version__,
            "capability": self._module._cudart.capability,
            "profiles": [profile._shapes for profile in config._profiles],
        }
        head = json.dumps(facts).encode()
        return HostMemory(len(head).to_bytes(8, "little") + head + network._model.SerializeToString())


class _Runtime:
    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, plan: bytes) -> Any:
        size = int.from_bytes(plan[:8], "little")
        facts = json.loads(plan[8 : 8 + size])
        if facts["version"] != self._module.__version__ or facts["capability"] != self._module._cudart.capability:
            _say(self._logger, "ERROR", "the plan file is incompatible")
            return None
        return self._module.ICudaEngine(plan[8 + size :], facts["profiles"])


class _Engine:
    def __init__(self, model: bytes, profiles: list[Any]) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self._profiles = profiles
        self._inputs = {value.name: _ORT[value.type] for value in self._session.get_inputs()}
        self._outputs = {value.name: _ORT[value.type] for value in self._session.get_outputs()}

    @property
    def num_io_tensors(self) -> int:
        return len(self._inputs) + len(self._outputs)

    def get_tensor_name(self, index: int) -> str:
        return [*self._inputs, *self._outputs][index]

    def get_tensor_mode(self, name: str) -> Any:
        return self._module.TensorIOMode.INPUT if name in self._inputs else self._module.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return self._module.DataType[{**self._inputs, **self._outputs}[name]]

    def create_execution_context(self) -> Any:
        return self._module.IExecutionContext(self)


class _Context:
    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._profile = 0

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self._profile = index
        return index < len(self._engine._profiles)

    def set_input_shape(self, name: str, shape: Any) -> bool:
        low, _, high = self._engine._profiles[self._profile][name]
        self._shapes[name] = tuple(shape)
        return len(shape) == len(low) and all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True))

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return bool(address)

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self._shapes:
            return self._shapes[name]
        feed = {key: np.ones(shape, _NUMPY[self._engine._inputs[key]]) for key, shape in self._shapes.items()}
        feed["input_ids"][...] = 0
        (value,) = self._engine._session.run([name], feed)
        return value.shape

    def execute_async_v3(self, stream: int) -> bool:
        shapes, addresses, engine = dict(self._shapes), dict(self._addresses), self._engine
        if addresses.keys() != {*engine._inputs, *engine._outputs}:
            return False
        cudart = self._module._cudart

        def run() -> None:
            feed = {}
            for name, kind in engine._inputs.items():
                array = np.empty(shapes[name], _NUMPY[kind])
                assert array.nbytes == 0 or cudart.inside(addresses[name], array.nbytes), f"{name} outside of memory"
                ctypes.memmove(array.ctypes.data, addresses[name], array.nbytes)
                feed[name] = array
            for name, value in zip(engine._outputs, engine._session.run(list(engine._outputs), feed), strict=True):
                value = np.ascontiguousarray(value)
                assert cudart.inside(addresses[name], value.nbytes), f"{name} outside of memory"
                ctypes.memmove(addresses[name], value.ctypes.data, value.nbytes)

        cudart.submit(run)
        return True
