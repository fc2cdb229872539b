"""What makes a factorised linear well formed. Every violation is one NetworkError sentence."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from mixt_export.errors import NetworkError
from mixt_export.network import limits

if TYPE_CHECKING:
    from mixt_export.network.ir import Branch, Core, FactorizedLinear, Mode, SparseResidual, TensorRef

_FLOAT_BYTES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
}
_INDEX_BYTES = {"int64": 8, "int32": 4}
ITEM_BYTES = {
    **_FLOAT_BYTES,
    **_INDEX_BYTES,
    "complex128": 16,
    "complex64": 8,
    "uint64": 8,
    "uint32": 4,
    "int16": 2,
    "uint16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
"""Bytes of one element of each dtype a checkpoint may hold."""

_LABEL = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,31}")


def is_count(value: Any) -> bool:
    """Whether ``value`` is an int (not a bool) of at least 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_number(value: Any) -> bool:
    """Whether ``value`` is an int or float (not a bool) that a float64 holds as a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def check_tensor(tensor: TensorRef) -> None:
    """Raise NetworkError unless name, shape and dtype make sense."""
    if not isinstance(tensor.name, str) or not tensor.name:
        raise NetworkError(f"A tensor needs a non-empty name, found {tensor.name!r}.")
    if not isinstance(tensor.shape, tuple) or not all(is_count(size) for size in tensor.shape):
        raise NetworkError(
            f"Tensor {tensor.name!r}: expected a shape of non-negative integers, found {tensor.shape!r}."
        )
    if tensor.dtype not in ITEM_BYTES:
        raise NetworkError(
            f"Tensor {tensor.name!r}: unknown dtype {tensor.dtype!r}, expected one of {', '.join(ITEM_BYTES)}."
        )


def check_core(core: Core) -> None:
    """Raise NetworkError unless the core has one label per axis, no label twice, no empty axis and a float dtype."""
    name, shape, labels = core.tensor.name, core.tensor.shape, core.labels
    if not isinstance(labels, tuple):
        raise NetworkError(f"Core {name!r}: expected a tuple of labels, found {labels!r}.")
    _check_labels(f"Core {name!r}", labels)
    if len(shape) != len(labels):
        raise NetworkError(
            f"Core {name!r}: expected one axis per label {_tuple(labels)}, found shape {shape} with {len(shape)} axes."
        )
    if len(shape) > limits.MAX_AXES:
        raise NetworkError(f"Core {name!r}: expected at most {limits.MAX_AXES} axes, found {len(shape)}.")
    if 0 in shape:
        raise NetworkError(f"Core {name!r}: expected axes of at least 1, found shape {shape}.")
    if core.tensor.dtype not in _FLOAT_BYTES:
        raise NetworkError(f"Core {name!r}: expected a floating dtype, found {core.tensor.dtype}.")


def check_branch(branch: Branch) -> None:
    """Raise NetworkError unless modes and cores agree on sizes and every label leads somewhere."""
    for side, modes in (("input", branch.in_modes), ("output", branch.out_modes)):
        _check_modes(side, modes)
    if not isinstance(branch.padded, bool):
        raise NetworkError(f"A branch's padded is true or false, found {branch.padded!r}.")
    if not is_number(branch.scale):
        raise NetworkError(f"A branch's scale is a finite number, found {branch.scale!r}.")
    if not isinstance(branch.cores, tuple) or len(branch.cores) > limits.MAX_CORES:
        raise NetworkError(f"A branch has a tuple of at most {limits.MAX_CORES} cores, found {_amount(branch.cores)}.")
    _check_sizes(branch)
    _check_reach(branch)


def check_sparse(sparse: SparseResidual) -> None:
    """Raise NetworkError unless rows, cols and values are vectors of one length, indices integers, values floats."""
    shape = sparse.values.shape
    for tensor, allowed in ((sparse.values, _FLOAT_BYTES), (sparse.rows, _INDEX_BYTES), (sparse.cols, _INDEX_BYTES)):
        if len(tensor.shape) != 1 or tensor.shape != shape:
            raise NetworkError(
                f"Sparse tensor {tensor.name!r}: expected a vector as long as the values {shape}, "
                f"found shape {tensor.shape}."
            )
        if tensor.dtype not in allowed:
            raise NetworkError(
                f"Sparse tensor {tensor.name!r}: expected dtype {' or '.join(allowed)}, found {tensor.dtype}."
            )


def check_linear(linear: FactorizedLinear) -> None:
    """Raise NetworkError, naming the linear, unless branches, bias and tensor names fit it."""
    if not isinstance(linear.name, str) or not linear.name:
        raise NetworkError(f"A factorised linear needs a non-empty name, found {linear.name!r}.")
    where = f"Linear {linear.name!r}"
    for side, features in (("in_features", linear.in_features), ("out_features", linear.out_features)):
        if not is_count(features) or not 1 <= features <= limits.MAX_FEATURES:
            raise NetworkError(f"{where}: expected {side} in 1..{limits.MAX_FEATURES}, found {features!r}.")
    if not isinstance(linear.method, str):
        raise NetworkError(f"{where}: expected the method's name, found {linear.method!r}.")
    if not isinstance(linear.branches, tuple) or not 1 <= len(linear.branches) <= limits.MAX_BRANCHES:
        raise NetworkError(
            f"{where}: expected a tuple of 1 to {limits.MAX_BRANCHES} branches, found {_amount(linear.branches)}."
        )
    for index, branch in enumerate(linear.branches):
        _check_features(f"{where}, branch {index}", branch, linear.in_features, linear.out_features)
    if linear.bias is not None and (
        linear.bias.shape != (linear.out_features,) or linear.bias.dtype not in _FLOAT_BYTES
    ):
        raise NetworkError(
            f"{where}: expected the bias {linear.bias.name!r} to be floats of shape ({linear.out_features},), "
            f"found {linear.bias.dtype} {linear.bias.shape}."
        )
    _check_names(where, linear)


def _check_modes(side: str, modes: tuple[Mode, ...]) -> None:
    if not isinstance(modes, tuple) or not modes:
        raise NetworkError(f"A branch needs a tuple of one or more {side} modes, found {modes!r}.")
    for mode in modes:
        if not isinstance(mode, tuple) or len(mode) != 2 or not is_count(mode[1]) or mode[1] == 0:
            raise NetworkError(f"The {side} modes of a branch are (label, size) with size at least 1, found {mode!r}.")
    _check_labels(f"The {side} modes of a branch", tuple(label for label, _ in modes))
    product = math.prod(size for _, size in modes)
    if product > limits.MAX_FEATURES * limits.MAX_PADDING:
        raise NetworkError(f"The {side} modes of a branch multiply up to {product}, which no layer has.")


def _check_labels(where: str, labels: tuple[str, ...]) -> None:
    for label in labels:
        if not isinstance(label, str) or not _LABEL.fullmatch(label):
            raise NetworkError(
                f"{where}: a label is a letter or _ followed by at most 31 letters, digits or _, found {label!r}."
            )
    repeated = [label for label, count in Counter(labels).items() if count > 1]
    if repeated:
        raise NetworkError(f"{where}: expected each label once, found {repeated[0]!r} twice in {_tuple(labels)}.")


def _check_sizes(branch: Branch) -> None:
    """Every label has one size wherever it occurs."""
    known: dict[str, tuple[int, str]] = {label: (size, "the input modes") for label, size in branch.in_modes}
    places = [(f"core {core.tensor.name!r}", core.modes()) for core in branch.cores]
    for place, modes in (*places, ("the output modes", branch.out_modes)):
        for label, size in modes:
            expected, first = known.setdefault(label, (size, place))
            if size != expected:
                raise NetworkError(f"Label {label!r} of {place}: expected size {expected} as in {first}, found {size}.")
    if len(known) > limits.MAX_LABELS:
        raise NetworkError(f"A branch has at most {limits.MAX_LABELS} labels, found {len(known)}.")


def _check_reach(branch: Branch) -> None:
    """Every output label comes from somewhere, every input label is read, every bond has two ends."""
    inputs, outputs = dict(branch.in_modes), dict(branch.out_modes)
    ends = Counter(label for core in branch.cores for label in core.labels)
    for label in outputs:
        if label not in ends and label not in inputs:
            raise NetworkError(
                f"Output label {label!r} cannot be reached: it is in no core and not in the input modes."
            )
    for label in inputs:
        if label not in ends and label not in outputs:
            raise NetworkError(
                f"Input label {label!r} is read by nobody: it is in no core and not in the output modes."
            )
    for core in branch.cores:
        for label, size in core.modes():
            if ends[label] == 1 and label not in inputs and label not in outputs and size > 1:
                raise NetworkError(
                    f"Label {label!r} of core {core.tensor.name!r}: expected a second end in another core, the input "
                    f"or the output, found none (only size 1 may dangle, found {size})."
                )


def _check_features(where: str, branch: Branch, in_features: int, out_features: int) -> None:
    sides = (("input", branch.in_modes, in_features), ("output", branch.out_modes, out_features))
    for side, modes, features in sides:
        product = math.prod(size for _, size in modes)
        fits = features <= product <= limits.MAX_PADDING * features if branch.padded else product == features
        if not fits:
            wanted = f"{features} to {limits.MAX_PADDING * features} (padded)" if branch.padded else str(features)
            raise NetworkError(
                f"{where} with cores {_cores(branch)}: expected {side} modes that multiply up to {wanted}, "
                f"found {_modes(modes)} = {product}."
            )


def _check_names(where: str, linear: FactorizedLinear) -> None:
    known: dict[str, TensorRef] = {}
    for tensor in linear.references():
        first = known.setdefault(tensor.name, tensor)
        if first != tensor:
            raise NetworkError(
                f"{where}: expected tensor {tensor.name!r} to be {first.dtype} {first.shape} everywhere, "
                f"found {tensor.dtype} {tensor.shape}."
            )


def _tuple(labels: tuple[str, ...]) -> str:
    return f"({', '.join(labels)})"


def _modes(modes: tuple[Mode, ...]) -> str:
    return " × ".join(f"{label}:{size}" for label, size in modes)


def _cores(branch: Branch) -> str:
    return ", ".join(repr(core.tensor.name) for core in branch.cores) or "(none)"


def _amount(value: object) -> str:
    return str(len(value)) if isinstance(value, tuple) else repr(value)
