"""Plugins of TensorRT 10.9 and later that launch compiled kernels in place of functions of the domain ``mixt``.

They are "quickly deployable" plugins with an ahead-of-time implementation: while an engine is built, they hand TensorRT
PTX that was compiled elsewhere and expressions for its launch; the engine then runs without Python. One operator has
one registration for the life of the process. What a kernel gets is the plugin's inputs, int32 numbers, outputs.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from . import tactics
from .errors import TrtError
from .kernel_files import KernelFile, KernelIndex, read_index

NAMESPACE = "mixt"
FIRST_VERSION = "10.9"

_TYPES = {"FP16": "float16", "FP32": "float32"}
#: One kernel serves a linear at every number of tokens; TensorRT wants its number.
_TACTIC = 1


def plugin_module(module: Any) -> Any | None:
    """``tensorrt.plugin`` where ``module`` can launch compiled kernels, None in an older or smaller library."""
    if not hasattr(module, "QuickPluginCreationRequest"):
        return None
    try:
        found = importlib.import_module(f"{module.__name__}.plugin")
    except ImportError:
        return None
    return found if hasattr(found, "aot_impl") else None


def use_kernels(module: Any, folder: Path) -> tuple[tuple[str, ...], str]:
    """Register the kernels in ``folder`` where there are some and ``module`` can launch them.

    Returns the operators that kernels execute, and a sentence about it. Raises TrtError for a folder that was changed.
    """
    index = read_index(folder)
    if index is None or not index.operators:
        return (), "no compiled kernels: every operator is built from standard ones"
    if plugin_module(module) is None:
        text = f"compiled kernels are left out, which TensorRT {FIRST_VERSION} and later can launch"
        return (), f"{text}: every operator is built from standard ones"
    return register(module, index), f"compiled kernels execute {', '.join(index.operators)}"


def linear_of(operator: str, tensors: Sequence[Any], given: Mapping[str, Any], dtype: str, bias: bool) -> Any:
    """The linear (tactics.Train or tactics.Mixture) of a node: ``tensors`` have a ``shape``, ``given`` its attributes.

    Raises TrtError for an operator that has no kernels.
    """
    return _kind(operator)[0](operator.removesuffix("Bias"), tensors, given, dtype, bias)


def register(module: Any, index: KernelIndex) -> tuple[str, ...]:
    """Register a plugin for every operator of ``index``; returns the operators.

    Raises TrtError for an operator that these adapters do not know, or a kernel file that is not the one indexed.
    """
    plugin = plugin_module(module)
    if plugin is None:
        raise TrtError(f"this TensorRT cannot launch compiled kernels (it needs {FIRST_VERSION}); use --no-kernels.")
    texts = {name: file.ptx() for name, file in index.kernels.items()}
    for operator in index.operators:
        _register(module, plugin, operator, index, texts)
    return index.operators


def _register(module: Any, plugin: Any, operator: str, index: KernelIndex, texts: dict[str, str]) -> None:
    bias = operator.endswith("Bias")
    make, out_features, attributes, matrices = _kind(operator)
    inputs = ["x", *(f"w{number}" for number in range(1, matrices + 1)), *(["bias"] if bias else [])]
    identity = f"{NAMESPACE}::{operator}"

    def describe(*tensors: Any, **given: Any) -> Any:
        y = tensors[0].like()
        y.shape_expr[len(y.shape_expr) - 1] = out_features(tensors, given)
        return y

    def offer(*values: Any) -> Any:
        tensors, given = _split(values[:-1], inputs, attributes)
        types = []
        for name, dtype in _TYPES.items():
            kernel = make(operator.removesuffix("Bias"), tensors, given, dtype, bias).kernel()
            if kernel is not None and kernel.name in texts:
                types.append(plugin.AutoTuneCombination(", ".join([name] * (len(inputs) + 1)), "LINEAR", [_TACTIC]))
        return types

    def launch(*values: Any) -> Any:
        *values_, _outputs, _tactic = values
        tensors, given = _split(values_, inputs, attributes)
        dtype = "float16" if tensors[0].dtype == module.DataType.HALF else "float32"
        linear = make(operator.removesuffix("Bias"), tensors, given, dtype, bias)
        kernel = linear.kernel()
        return _launch(plugin, linear, kernel, index.kernels[kernel.name], texts[kernel.name], tensors[0])

    desc = plugin.TensorDesc
    parameters = [_parameter(name, desc) for name in inputs] + [_parameter(*attribute) for attribute in attributes]
    result = tuple[desc]  # type: ignore[valid-type]
    aot = tuple[str, str, plugin.KernelLaunchParams, plugin.SymExprs]
    outputs, tactic = _parameter("outputs", result), _parameter("tactic", int)
    combinations = list[plugin.AutoTuneCombination]
    plugin.register(identity)(_with(describe, parameters, desc))
    plugin.autotune(identity)(_with(offer, [*parameters, outputs], combinations))
    plugin.aot_impl(identity)(_with(launch, [*parameters, outputs, tactic], aot))


def _launch(plugin: Any, linear: Any, kernel: tactics.Kernel, file: KernelFile, ptx: str, x: Any) -> Any:
    """What TensorRT asks an ahead-of-time plugin for: entry, PTX, launch, numbers."""
    how = linear.launch(kernel)
    tokens = x.shape_expr[0] * x.shape_expr[1]
    grid = plugin.KernelLaunchParams()
    few = tokens * how.turns if how.apart else how.turns
    grid.grid_x, grid.grid_y = plugin.cdiv(tokens, how.tokens), how.blocks
    grid.grid_z = (tokens < tactics.FEW + 1) * (few - 1) + 1
    grid.block_x, grid.shared_mem = file.threads, file.shared
    numbers = plugin.SymIntExprs(1 + len(how.numbers))
    numbers[0] = plugin.SymInt32(tokens)
    for position, number in enumerate(how.numbers, 1):
        numbers[position] = plugin.SymInt32(number)
    return file.entry, ptx, grid, numbers


def _train(_operator: str, tensors: Sequence[Any], _given: Mapping[str, Any], dtype: str, bias: bool) -> tactics.Train:
    """Sizes are those of the cores (r_(k-1), out_k, in_k, r_k)."""
    cores = [_sizes(tensor) for tensor in tensors[1 : len(tensors) - bias]]
    return tactics.Train(
        tuple(core[2] for core in cores), tuple(core[1] for core in cores), tuple(core[3] for core in cores[:-1]),
        dtype, bias,
    )  # fmt: skip


def _train_features(tensors: Any, _given: Mapping[str, Any]) -> Any:
    cores = [tensor for tensor in tensors[1:] if len(tensor.shape_expr) == 4]
    features = cores[0].shape_expr[1]
    for core in cores[1:]:
        features = features * core.shape_expr[1]
    return features


def _mixture(
    operator: str, _tensors: Sequence[Any], given: Mapping[str, Any], dtype: str, bias: bool
) -> tactics.Mixture:
    """Sizes are those of the attribute ``windows``: in, out, then left, rows, columns, right of each window."""
    inside, outside, *sizes = (int(size) for size in given["windows"])
    windows = tuple(tactics.Window(*sizes[start : start + 4]) for start in range(0, len(sizes), 4))
    return tactics.Mixture(inside, outside, windows, operator.endswith("Left"), dtype, bias)


def _mixture_features(_tensors: Any, given: Mapping[str, Any]) -> int:
    return int(given["windows"][1])


#: Operator's name without digits -> its linear, its output features, its attributes with types.
_KINDS: dict[str, tuple[Callable[..., Any], Callable[..., Any], tuple[tuple[str, Any], ...]]] = {
    "TTLinear": (_train, _train_features, ()),
    "MixTLinear": (_mixture, _mixture_features, (("windows", npt.NDArray[np.int64]),)),
}


def _kind(operator: str) -> tuple[Callable[..., Any], Callable[..., Any], tuple[tuple[str, Any], ...], int]:
    """What `_KINDS` says of ``operator``, and its number of cores or windows."""
    for kind, facts in _KINDS.items():
        digit = operator.removeprefix(kind)[:1]
        if operator.startswith(kind) and digit.isdigit():
            return (*facts, int(digit))
    raise TrtError(f"{operator}: these scripts have no plugin for it; export again, or build with --no-kernels.")


def _sizes(tensor: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in tensor.shape)


def _split(values: Any, inputs: list[str], attributes: Any) -> tuple[list[Any], dict[str, Any]]:
    names = [name for name, _ in attributes]
    return list(values[: len(inputs)]), dict(zip(names, values[len(inputs) :], strict=True))


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=annotation)


def _with(function: Callable[..., Any], parameters: list[inspect.Parameter], result: Any) -> Callable[..., Any]:
    """``function`` with the signature that TensorRT reads."""
    function.__signature__ = inspect.Signature(parameters, return_annotation=result)  # type: ignore[attr-defined]
    return function
