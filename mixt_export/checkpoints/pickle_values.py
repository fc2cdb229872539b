"""What a pickle may speak of: names, records, tensors, and the few calls that are made in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

_FORBIDDEN = """
asyncio bdb builtins code codeop commands ctypes http imp importlib inspect io marshal multiprocessing nt operator os
pathlib pdb pickle pip platform popen2 posix posixpath pty runpy shelve shutil site socket subprocess sys tempfile
threading timeit trace types urllib venv webbrowser zipimport __builtin__ _io _pickle _posixsubprocess
"""
_PLAIN_VALUES = "bool bytearray bytes complex dict float frozenset int list object set slice str tuple"

#: Modules nothing of which may even be named: what runs code, starts programs, or reaches other machines.
FORBIDDEN = frozenset(_FORBIDDEN.split())
#: Names of forbidden modules that stand for plain values.
PLAIN = frozenset(_PLAIN_VALUES.split())
#: Classes of these packages, called with plain values (enumerations, settings), become records: nothing is called.
INERT_PACKAGES = frozenset({"tokenizers", "transformers"})


@dataclass(frozen=True, slots=True)
class Global:
    """A name that the file refers to; never imported."""

    module: str
    name: str

    def __str__(self) -> str:
        """``module.name``."""
        return f"{self.module}.{self.name}"


@dataclass(slots=True, eq=False)
class Record:
    """An object of the class called ``cls``: the arguments it was made with and the state it was given."""

    cls: Global
    args: tuple[Any, ...] = ()
    state: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StorageRef:
    """A storage of the container: ``numel`` elements of torch's ``kind`` (``FloatStorage``) under ``key``."""

    kind: str
    key: str
    numel: int


@dataclass(frozen=True, slots=True)
class TensorView:
    """A tensor: ``shape`` and ``strides`` in elements, beginning ``offset`` elements into its storage."""

    storage: StorageRef
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def is_count(value: Any) -> bool:
    """Whether ``value`` is a number of elements that a file may speak of."""
    return type(value) is int and 0 <= value < _MOST


def checked_keys(pairs: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """``pairs`` for a dict. ValueError for a key whose hash may cost more than it takes to write the key.

    A tuple that holds the same tuple twice, and so on, takes exponential time to hash; multiples of Python's hash
    modulus all have the same hash. Keys of tuples are for merges of tokenizers: two texts.
    """
    for key, value in pairs:
        for part in key if isinstance(key, tuple) and len(key) <= _LONGEST_KEY else (key,):
            small = not isinstance(part, int | float) or -_MOST < part < _MOST
            if not isinstance(part, _KEYS) or not small:
                raise ValueError("a key that is no name and no number")
        yield key, value


def _tensor(storage: Any, offset: int, shape: Iterable[int], strides: Iterable[int], *_rest: Any) -> TensorView:
    """torch._utils._rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks[, metadata])."""
    sizes, steps = tuple(shape), tuple(strides)
    if not isinstance(storage, StorageRef) or len(sizes) != len(steps) or len(sizes) > 32:
        raise ValueError("a tensor without storage, or with as many strides as axes")
    if not all(map(is_count, (offset, *sizes, *steps))):
        raise ValueError("a tensor with sizes that are no counts")
    if len(_rest) > 2 and _rest[2]:
        raise ValueError("a tensor with lazy operations")
    return TensorView(storage, offset, sizes, steps)


def _parameter(data: Any, *_rest: Any) -> Any:
    """torch._utils._rebuild_parameter(data, requires_grad, hooks[, state])."""
    return data


def _typed(function: Any, _kind: Any, arguments: Any, _state: Any) -> Any:
    """torch._tensor._rebuild_from_type_v2: a tensor with attributes of Python's, which are left out."""
    if not isinstance(function, Global) or not isinstance(arguments, tuple):
        raise TypeError("a tensor that is made by something that is no name")
    return _REBUILDERS[function.module, function.name](*arguments)


def _mapping(*arguments: Any) -> dict[Any, Any]:
    """OrderedDict() or OrderedDict([(key, value), …])."""
    if len(arguments) > 1:
        raise TypeError("a mapping made of more than one value")
    given = arguments[0] if arguments else ()
    return dict(checked_keys(given.items() if isinstance(given, dict) else given))


def _default_dict(_factory: Any = None, *arguments: Any) -> dict[Any, Any]:
    return _mapping(*arguments)


def _encode(text: str, encoding: str = "utf-8") -> bytes:
    """_codecs.encode: how protocol 2 writes bytes."""
    if encoding != "latin1" and encoding != "utf-8":
        raise ValueError("an encoding other than latin1 and utf-8")
    return text.encode(encoding)


def _device(*arguments: Any) -> str:
    if len(arguments) > 2 or not all(isinstance(value, str | int) for value in arguments):
        raise TypeError("a device that is no name and number")
    return ":".join(map(str, arguments))


def _reconstructor(cls: Any, _base: Any, _state: Any) -> Record:
    """copyreg._reconstructor: an empty object of a class, protocols 0 and 1."""
    if not isinstance(cls, Global):
        raise TypeError("an object of something that is no class")
    return Record(cls)


_KEYS = (str, bytes, int, float, type(None), Global, Record, TensorView)
_LONGEST_KEY = 8
#: More elements than any file holds; far below what overflows a file's offset or Python's hash modulus, 2^61 - 1.
_MOST = 2**48

_REBUILDERS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
}
CALLS: dict[tuple[str, str], Callable[..., Any]] = {
    **_REBUILDERS,
    ("torch._tensor", "_rebuild_from_type_v2"): _typed,
    ("torch", "Size"): tuple,
    ("torch", "device"): _device,
    ("collections", "OrderedDict"): _mapping,
    ("collections", "defaultdict"): _default_dict,
    ("_codecs", "encode"): _encode,
    ("copyreg", "_reconstructor"): _reconstructor,
    ("copy_reg", "_reconstructor"): _reconstructor,
    **{
        (module, name): kind
        for module in ("builtins", "__builtin__")
        for name, kind in (("set", list), ("frozenset", list), ("list", list), ("dict", _mapping), ("tuple", tuple))
    },
    **{(module, "bytearray"): lambda *arguments: b"" for module in ("builtins", "__builtin__")},
}
"""What is called by this file in place of what the pickle names. Sets become lists: their elements need no hash."""
