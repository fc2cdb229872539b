"""A ``tensorrt`` whose core is imitated and whose package ``tensorrt.plugin`` is NVIDIA's own, from a wheel.

The core is what that package needs: enumerations, empty base classes, descriptors, expressions that know their value.
It shows how our plugins answer the package; what libnvinfer does with the answers is not shown.
"""

from __future__ import annotations

import enum
import hashlib
import importlib
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from mixt_export.sample import cache_folder

#: version -> requirement, sha256 of its wheel for Python 3.11 on x86-64 Linux; the package in it is pure Python
WHEELS = {
    "10.9": ("tensorrt-cu12-bindings==10.9.0.34", "50c78fd66dbb515b135d5f4fe28790f2eda119756950b51a6a45a77736a14b47"),
    "10.13": ("tensorrt-cu12-bindings==10.13.3.9", "33aa9d104c04b008871645a97bd8a1a02279cf498d251df5e767d9d5183e0646"),
    "10.16": ("tensorrt-cu13-bindings==10.16.1.11", "f986d47980d042cc126506a9b84586e55ad13737a7a46826fe45457c04d66294"),
    "11.4": ("tensorrt-cu13-bindings==11.4.0.106", "d072ac2a095e2be749fefc847adfb25d5ebe70303401df62ede8fe67a59f27fc"),
}
_PLATFORM = ("--platform", "manylinux_2_28_x86_64", "--python-version", "3.11", "--only-binary", ":all:", "--no-deps")
_ENUMS = {
    "DataType": "FLOAT HALF INT8 INT32 BOOL UINT8 FP8 BF16 INT64 INT4 FP4",
    "TensorFormat": "LINEAR CHW2 HWC8",
    "DimensionOperation": "SUM PROD MAX MIN SUB EQUAL LESS FLOOR_DIV CEIL_DIV",
    "PluginFieldType": "FLOAT16 FLOAT32 FLOAT64 INT8 INT16 INT32 INT64 CHAR DIMS UNKNOWN BF16",
    "TensorRTPhase": "BUILD RUNTIME",
    "QuickPluginCreationRequest": "UNKNOWN PREFER_JIT PREFER_AOT STRICT_JIT STRICT_AOT",
    "PluginArgType": "INT",
    "PluginArgDataType": "INT8 INT16 INT32",
}
_BASES = (
    *("IPluginV3", "IPluginV3QuickCore", "IPluginV3QuickBuild", "IPluginV3QuickAOTBuild", "IPluginV3QuickRuntime"),
    *("IPluginCreatorV3Quick", "ISymExpr", "ITensor", "IExprBuilder"),
)
_OPERATIONS = {
    "SUM": lambda a, b: a + b, "PROD": lambda a, b: a * b, "SUB": lambda a, b: a - b, "MAX": max, "MIN": min,
    "EQUAL": lambda a, b: int(a == b), "LESS": lambda a, b: int(a < b), "FLOOR_DIV": lambda a, b: a // b,
    "CEIL_DIV": lambda a, b: -(-a // b),
}  # fmt: skip


def wheel(version: str) -> Path:
    """The pinned wheel, downloaded into the cache when it is not there."""
    requirement, digest = WHEELS[version]
    folder = cache_folder() / "tensorrt-bindings"
    found = [path for path in folder.glob("*.whl") if hashlib.sha256(path.read_bytes()).hexdigest() == digest]
    if not found:
        command = [sys.executable, "-m", "pip", "download", "--quiet", *_PLATFORM, requirement, "-d", str(folder)]
        subprocess.run(command, check=True)
        found = [path for path in folder.glob("*.whl") if hashlib.sha256(path.read_bytes()).hexdigest() == digest]
    assert found, f"{requirement}: what was downloaded is not the pinned wheel"
    return found[0]


class Expression:
    """An IDimensionExpr; ``value`` at one launch, ``constant``: known while building."""

    def __init__(self, value: int, constant: bool = True) -> None:
        self.value, self._constant = int(value), constant

    def is_constant(self) -> bool:
        return self._constant

    def get_constant_value(self) -> int:
        assert self._constant, "not a constant while the engine is built"
        return self.value


class Builder:
    """An IExprBuilder."""

    def constant(self, value: int) -> Expression:
        return Expression(value)

    def operation(self, operation: enum.Enum, left: Expression, right: Expression) -> Expression:
        value = _OPERATIONS[operation.name](left.value, right.value)
        return Expression(value, left.is_constant() and right.is_constant())


class Field:
    """A PluginField; ``data`` of numbers is an array, as in the bindings."""

    def __init__(self, name: str, data: Any = b"", type: Any = None) -> None:
        self.name, self.data, self.type = name, data, type


class Registry:
    """The plugin registry."""

    def __init__(self) -> None:
        self.creators: dict[tuple[str, str, str], Any] = {}

    def register_creator(self, creator: Any, namespace: str) -> None:
        self.creators[creator.name, creator.plugin_version, namespace] = creator

    def get_creator(self, name: str, version: str, namespace: str) -> Any:
        return self.creators[name, version, namespace]


class _Dims(tuple):  # type: ignore[type-arg]
    MAX_DIMS = 8


@contextmanager
def tensorrt_of(version: str, folder: Path) -> Iterator[Any]:
    """The module ``tensorrt`` with ``version``'s plugin package, in ``folder``; gone from sys.modules after."""
    with zipfile.ZipFile(wheel(version)) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if "/plugin/" in name])
    (package,) = folder.glob("*/plugin")
    core: Any = ModuleType("tensorrt")
    core.__path__ = [str(package.parent)]
    core.__version__ = version
    for name, members in _ENUMS.items():
        setattr(core, name, enum.Enum(name, members.split()))
    for name in _BASES:
        setattr(core, name, type(name, (), {"__init__": lambda self: None}))
    core.IDimensionExpr, core.PluginField, core.PluginFieldCollection = Expression, Field, list
    core.Dims = _Dims
    core.DimsExprs = lambda length: [None] * length
    core.PluginTensorDesc = type("PluginTensorDesc", (SimpleNamespace,), {})
    core.DynamicPluginTensorDesc = type("DynamicPluginTensorDesc", (SimpleNamespace,), {})
    core.Logger = type("Logger", (), {"WARNING": 1, "log": lambda self, severity, text: None})
    core.float32, core.float16 = core.DataType.FLOAT, core.DataType.HALF
    registry = Registry()
    core.get_plugin_registry = lambda: registry
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "tensorrt"}
    for name in before:
        del sys.modules[name]
    sys.modules["tensorrt"] = core
    try:
        core.plugin = importlib.import_module("tensorrt.plugin")
        yield core
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "tensorrt"]:
            del sys.modules[name]
        sys.modules.update(before)


def launch(core: Any, operator: str, shapes: list[tuple[int, ...]], dtype: str, fields: dict[str, list[int]],
           tokens: tuple[int, int]) -> dict[str, Any]:  # fmt: skip
    """Go through what TensorRT asks while it builds a node, for x (*tokens, in) and weights of ``shapes``.

    Returns output shape, offered types and tactics, and per tactic grid, block, shared memory, numbers, entry and PTX.
    """
    creator = core.get_plugin_registry().get_creator(operator, "1", "mixt")
    declared = {field.name for field in creator.field_names}
    # The parser passes declared fields only, lists of integers as INT32.
    given = [
        Field(name, np.asarray(values, np.int32), core.PluginFieldType.INT32)
        for name, values in fields.items()
        if name in declared
    ]
    plugin = creator.create_plugin(
        operator, "mixt", given, core.TensorRTPhase.BUILD, core.QuickPluginCreationRequest.STRICT_AOT
    )
    kind, linear = core.DataType[dtype], core.TensorFormat.LINEAR
    assert plugin.get_output_data_types([kind] * len(shapes), [len(shape) for shape in shapes]) == [kind]
    x, *weights = shapes
    inputs = [[Expression(tokens[0], False), Expression(tokens[1], False), Expression(x[-1])]]
    inputs += [[Expression(size) for size in shape] for shape in weights]
    (output,) = plugin.get_output_shapes(inputs, [], Builder())
    y = tuple(size.value for size in output)
    descriptions = [
        core.DynamicPluginTensorDesc(
            desc=core.PluginTensorDesc(type=kind, format=linear, dims=dims, scale=0.0), opt=dims, min=dims, max=dims
        )
        for dims in ((-1, -1, x[-1]), *weights, (-1, -1, y[-1]))
    ]
    found: dict[str, Any] = {"output": y, "last_is_constant": output[-1].is_constant(), "launches": {}}
    combinations = plugin.get_supported_format_combinations(descriptions, len(shapes))
    found["types"] = [combination.type.name for combination in combinations[:: len(descriptions)]]
    found["formats"] = {combination.format.name for combination in combinations}
    plugin.curr_comb = next(comb for comb in plugin.supported_combs if comb.types[0] == kind)
    for tactic in sorted(plugin.get_valid_tactics()):
        plugin.set_tactic(tactic)
        parameters, setter = SimpleNamespace(), _Setter()
        plugin.get_launch_params(inputs, descriptions, len(shapes), parameters, setter, Builder())
        described = [description.desc for description in descriptions]
        entry, ptx = plugin.get_kernel(described[:-1], described[-1:])
        values = {name: expression.expr.value for name, expression in vars(parameters).items()}
        found["launches"][tactic] = values | {"numbers": setter.values(), "entry": entry, "ptx": ptx.decode()}
    return found


class _Setter(dict):  # type: ignore[type-arg]
    """Takes nbSymExprs and one expression per number."""

    nbSymExprs = 0  # noqa: N815 - the name of the bindings

    def values(self) -> list[int]:
        assert len(self) == self.nbSymExprs
        assert all(expression.dtype.name == "INT32" for expression in super().values())
        return [self[position].expr.value for position in range(self.nbSymExprs)]
