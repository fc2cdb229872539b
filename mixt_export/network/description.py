"""A factorised linear as JSON and back. Strict: a description is data from outside, and nothing in it is guessed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from mixt_export.errors import NetworkError
from mixt_export.network import checks, limits
from mixt_export.network.ir import Branch, Core, FactorizedLinear, Mode, SparseResidual, TensorRef

_SPARSE_KEYS = ("rows", "cols", "values")


def to_json(linear: FactorizedLinear) -> dict[str, Any]:
    """Description of ``linear`` without its name and without shapes: tensors are named, their headers tell the rest."""
    sparse = linear.sparse
    return {
        "method": linear.method,
        "in_features": linear.in_features,
        "out_features": linear.out_features,
        "branches": [_branch_to_json(branch) for branch in linear.branches],
        "bias": None if linear.bias is None else linear.bias.name,
        "sparse": None
        if sparse is None
        else {"rows": sparse.rows.name, "cols": sparse.cols.name, "values": sparse.values.name},
    }


def from_json(name: str, description: Any, tensors: Mapping[str, TensorRef]) -> FactorizedLinear:
    """The linear called ``name`` that ``description`` describes, its tensors looked up in ``tensors``.

    All keys of ``to_json`` are required and no others allowed. Raises NetworkError, naming the linear and the place, on
    unknown or missing keys, wrong types, sizes beyond ``limits``, absent tensors and everything that the constructors
    of the IR refuse.
    """
    try:
        return _Reader(tensors).linear(name, description)
    except NetworkError as error:
        text = str(error)
        raise NetworkError(text if repr(name) in text else f"Linear {name!r}: {text}") from error


def _branch_to_json(branch: Branch) -> dict[str, Any]:
    return {
        "in_modes": [list(mode) for mode in branch.in_modes],
        "out_modes": [list(mode) for mode in branch.out_modes],
        "scale": branch.scale,
        "padded": branch.padded,
        "cores": [{"tensor": core.tensor.name, "labels": list(core.labels)} for core in branch.cores],
    }


class _Reader:
    """Turns JSON values into parts of the IR; every method names the ``place`` it reads when it refuses."""

    def __init__(self, tensors: Mapping[str, TensorRef]) -> None:
        self._tensors = tensors

    def linear(self, name: str, value: Any) -> FactorizedLinear:
        keys = ("method", "in_features", "out_features", "branches", "bias", "sparse")
        method, in_features, out_features, branches, bias, sparse = _fields("the description", value, keys)
        return FactorizedLinear(
            name,
            _typed("in_features", in_features, int),
            _typed("out_features", out_features, int),
            tuple(
                self._branch(f"branches[{index}]", branch)
                for index, branch in enumerate(_items("branches", branches, limits.MAX_BRANCHES))
            ),
            None if bias is None else self._tensor("bias", bias),
            _typed("method", method, str),
            None if sparse is None else self._sparse(sparse),
        )

    def _branch(self, place: str, value: Any) -> Branch:
        in_modes, out_modes, scale, padded, cores = _fields(
            place, value, ("in_modes", "out_modes", "scale", "padded", "cores")
        )
        inputs, outputs = _modes(f"{place}.in_modes", in_modes), _modes(f"{place}.out_modes", out_modes)
        parts = tuple(
            self._core(f"{place}.cores[{index}]", core)
            for index, core in enumerate(_items(f"{place}.cores", cores, limits.MAX_CORES))
        )
        factor, wide = _number(f"{place}.scale", scale), _typed(f"{place}.padded", padded, bool)
        with _at(place):
            return Branch(inputs, outputs, parts, factor, wide)

    def _core(self, place: str, value: Any) -> Core:
        tensor, labels = _fields(place, value, ("tensor", "labels"))
        names = tuple(
            _typed(f"{place}.labels", label, str) for label in _items(f"{place}.labels", labels, limits.MAX_AXES)
        )
        reference = self._tensor(f"{place}.tensor", tensor)
        with _at(place):
            return Core(reference, names)

    def _sparse(self, value: Any) -> SparseResidual:
        rows, cols, values = (
            self._tensor(f"sparse.{side}", name)
            for side, name in zip(_SPARSE_KEYS, _fields("sparse", value, _SPARSE_KEYS), strict=True)
        )
        with _at("sparse"):
            return SparseResidual(rows, cols, values)

    def _tensor(self, place: str, name: Any) -> TensorRef:
        found = self._tensors.get(_typed(place, name, str))
        if found is None:
            raise NetworkError(f"{place} names the tensor {name!r}, which the model folder does not have.")
        return found


@contextmanager
def _at(place: str) -> Iterator[None]:
    """Put ``place`` in front of what the IR's constructors refuse."""
    try:
        yield
    except NetworkError as error:
        raise NetworkError(f"{place}: {error}") from error


def _fields(place: str, value: Any, keys: tuple[str, ...]) -> tuple[Any, ...]:
    entries = _typed(place, value, dict)
    missing = [key for key in keys if key not in entries]
    unknown = [key for key in entries if key not in keys]
    if missing or unknown:
        what = f"lacks {missing[0]!r}" if missing else f"has the unknown key {unknown[0]!r}"
        raise NetworkError(f"{place} {what}, expected {', '.join(keys)}.")
    return tuple(entries[key] for key in keys)


def _items(place: str, value: Any, most: int) -> list[Any]:
    items: list[Any] = _typed(place, value, list)
    if len(items) > most:
        raise NetworkError(f"{place}: expected at most {most} entries, found {len(items)}.")
    return items


def _modes(place: str, value: Any) -> tuple[Mode, ...]:
    modes = []
    for item in _items(place, value, limits.MAX_LABELS):
        pair = _items(place, item, 2)
        if len(pair) != 2:
            raise NetworkError(f"{place}: expected [label, size], found {pair!r}.")
        modes.append((_typed(place, pair[0], str), _typed(place, pair[1], int)))
    return tuple(modes)


def _number(place: str, value: Any) -> float:
    if not checks.is_number(value):
        raise NetworkError(f"{place}: expected a finite number, found {value!r}.")
    return float(value)


def _typed(place: str, value: Any, kind: type) -> Any:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise NetworkError(f"{place}: expected {kind.__name__}, found {type(value).__name__} {str(value)[:40]!r}.")
    return value
