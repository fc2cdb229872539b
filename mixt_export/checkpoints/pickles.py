"""A pickle read as data: a small stack machine that imports nothing and calls nothing that the file names.

Pickle is a program for a stack machine whose instructions may import any object and call it. Here an imported name
is a `Global`, a label and nothing else; an object of an unknown class becomes a `Record` of its class's name and its
state; the few calls that make tensors and plain containers are done by this program itself (pickle_values.CALLS). Every
other call, and every name from which code could be reached, is refused. Modelled on torch's weights-only loading
(torch/_weights_only_unpickler.py), stricter in what may be named, more lenient in that classes need not be known.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from mixt_export.checkpoints.pickle_values import (
    CALLS,
    FORBIDDEN,
    INERT_PACKAGES,
    PLAIN,
    Global,
    Record,
    StorageRef,
    checked_keys,
    is_count,
)
from mixt_export.errors import CheckpointError, UnsupportedError

#: Elements, letters and bytes that may be copied besides as many as the pickle is long: a small file could ask for any
#: number of copies of a large value.
_COPIES = 5_000_000
#: Instructions run: one byte may make an empty list, which takes sixty. A tokenizer's merges take some millions.
_INSTRUCTIONS = 10_000_000

_AGAIN = "download the file again"


_MARK = object()


def load(data: bytes, what: str) -> Any:
    """The value that the pickle ``data`` describes; ``what`` (a file) begins the messages.

    Raises UnsupportedError for a pickle that imports or calls anything but the making of tensors and containers,
    CheckpointError for one that is no pickle.
    """
    machine = _Machine(what, _COPIES + len(data))
    try:
        for count, (opcode, argument, _position) in enumerate(pickletools.genops(data)):
            if count >= _INSTRUCTIONS:
                raise CheckpointError(f"{what}: its pickle takes more than {_INSTRUCTIONS} instructions; {_AGAIN}.")
            step = _STEPS.get(opcode.name)
            if step is None:
                raise UnsupportedError(
                    f"{what}: uses the pickle instruction {opcode.name}, which model files do not need; it is not read."
                )
            step(machine, argument)
            if machine.done:
                return machine.result
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{what}: is no valid pickle ({type(error).__name__}: {reason}); {_AGAIN}.") from None
    raise CheckpointError(f"{what}: its pickle has no end; {_AGAIN}.")


class _Machine:
    """Stack and memo of one pickle."""

    def __init__(self, what: str, copies: int) -> None:
        self.what = what
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.result: Any = None
        self.done = False
        self._copies, self._allowed = 0, copies

    def copied(self, value: Any) -> Any:
        """``value``, the elements of which were copied; CheckpointError where there were too many copies."""
        if isinstance(value, list | tuple | dict | str | bytes):
            self._copies += len(value)
            if self._copies > self._allowed:
                raise CheckpointError(f"{self.what}: its pickle makes more than {self._allowed} copies; {_AGAIN}.")
        return value

    def since_mark(self) -> list[Any]:
        """Take everything above the last mark."""
        for index in range(len(self.stack) - 1, -1, -1):
            if self.stack[index] is _MARK:
                items = self.stack[index + 1 :]
                del self.stack[index:]
                return items
        raise ValueError("a mark is missing")

    def global_named(self, module: str, name: str) -> Global:
        """The label for a name; UnsupportedError where code could be reached through it."""
        root = module.partition(".")[0]
        if root in FORBIDDEN and not (root in ("builtins", "__builtin__") and name in PLAIN):
            raise UnsupportedError(
                f"{self.what}: its pickle names {f'{module}.{name}'!r}, which could run code when loaded; it is "
                "refused: do not load this file, get the weights as safetensors."
            )
        return Global(module, name)

    def call(self, function: Any, arguments: Any) -> Any:
        """What the call of a global gives, done here; UnsupportedError for calls that are not known."""
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise TypeError("a call of something that is no name")
        known = CALLS.get((function.module, function.name))
        if known is not None:
            return self.copied(known(*arguments))
        if function.module.partition(".")[0] in INERT_PACKAGES and function.name[:1].isupper():
            return Record(function, arguments)
        raise UnsupportedError(
            f"{self.what}: its pickle calls {str(function)!r}, and calls are not made for a file; save the model's "
            "state_dict alone (torch.save(model.state_dict(), …)), or as safetensors."
        )


def _push(machine: _Machine, value: Any) -> None:
    machine.stack.append(value)


def _constant(value: Any) -> Callable[[_Machine, Any], None]:
    return lambda machine, _argument: machine.stack.append(value)


def _fresh(make: Callable[[], Any]) -> Callable[[_Machine, Any], None]:
    return lambda machine, _argument: machine.stack.append(make())


def _last(count: int) -> Callable[[_Machine, Any], None]:
    def step(machine: _Machine, _argument: Any) -> None:
        items = [machine.stack.pop() for _ in range(count)]
        machine.stack.append(tuple(reversed(items)))

    return step


def _put(machine: _Machine, index: Any) -> None:
    machine.memo[int(index)] = machine.stack[-1]


def _memoize(machine: _Machine, _argument: Any) -> None:
    machine.memo[len(machine.memo)] = machine.stack[-1]


def _get(machine: _Machine, index: Any) -> None:
    machine.stack.append(machine.memo[int(index)])


def _global(machine: _Machine, argument: str) -> None:
    module, _, name = argument.partition(" ")
    machine.stack.append(machine.global_named(module, name))


def _stack_global(machine: _Machine, _argument: Any) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    if not isinstance(name, str) or not isinstance(module, str):
        raise TypeError("a name that is no text")
    machine.stack.append(machine.global_named(module, name))


def _reduce(machine: _Machine, _argument: Any) -> None:
    arguments, function = machine.stack.pop(), machine.stack.pop()
    machine.stack.append(machine.call(function, arguments))


def _new_object(machine: _Machine, _argument: Any) -> None:
    arguments, cls = machine.stack.pop(), machine.stack.pop()
    if not isinstance(cls, Global) or not isinstance(arguments, tuple):
        raise TypeError("an object of something that is no class")
    known = CALLS.get((cls.module, cls.name))
    machine.stack.append(Record(cls, arguments) if known is None else machine.copied(known(*arguments)))


def _new_object_ex(machine: _Machine, _argument: Any) -> None:
    keywords = machine.stack.pop()
    if keywords:
        raise ValueError("an object made with keywords")
    _new_object(machine, None)


def _build(machine: _Machine, _argument: Any) -> None:
    """State of an object: kept for records; what a plain container carries beside its items is not needed."""
    state = machine.stack.pop()
    target = machine.stack[-1]
    if isinstance(target, Record):
        own, slots = state if isinstance(state, tuple) and len(state) == 2 else (state, None)
        for part in (own, slots):
            if isinstance(part, dict):
                machine.copied(part)
                target.state.update(_named(part.items()))
    elif not isinstance(target, dict | list):
        raise TypeError("a state for something that is no object")


def _append(machine: _Machine, _argument: Any) -> None:
    value = machine.stack.pop()
    _extend_list(machine.stack[-1], [value])


def _appends(machine: _Machine, _argument: Any) -> None:
    items = machine.since_mark()
    _extend_list(machine.stack[-1], items)


def _extend_list(target: Any, items: list[Any]) -> None:
    if isinstance(target, list):
        target.extend(items)
    elif not isinstance(target, Record):
        raise TypeError("an item for something that is no list")


def _set_item(machine: _Machine, _argument: Any) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    _fill_mapping(machine.stack[-1], [key, value])


def _set_items(machine: _Machine, _argument: Any) -> None:
    items = machine.since_mark()
    _fill_mapping(machine.stack[-1], items)


def _fill_mapping(target: Any, items: list[Any]) -> None:
    """Items of a mapping; those of a record that is a mapping go to its state by name."""
    pairs = zip(items[::2], items[1::2], strict=True)
    if isinstance(target, dict):
        target.update(checked_keys(pairs))
    elif isinstance(target, Record):
        target.state.update(_named(pairs))
    else:
        raise TypeError("an item for something that is no mapping")


def _named(pairs: Iterable[tuple[Any, Any]]) -> Iterator[tuple[str, Any]]:
    """``pairs`` whose key is a name or a number, by name: the text of anything else may be of any length."""
    return ((str(key), value) for key, value in pairs if isinstance(key, str | int))


def _persistent(machine: _Machine, _argument: Any) -> None:
    """A storage: ("storage", class, key, location, elements)."""
    given = machine.stack.pop()
    if not isinstance(given, tuple) or len(given) < 5 or given[0] != "storage" or not isinstance(given[1], Global):
        raise ValueError("a persistent object that is no storage")
    key, numel = given[2], given[4]
    if given[1].module not in ("torch", "torch.storage") or not isinstance(key, str) or not is_count(numel):
        raise ValueError("a storage that is not described as torch does")
    machine.stack.append(StorageRef(given[1].name, key, numel))


def _stop(machine: _Machine, _argument: Any) -> None:
    machine.result, machine.done = machine.stack.pop(), True


def _pop(machine: _Machine, _argument: Any) -> None:
    machine.stack.pop()


def _pop_mark(machine: _Machine, _argument: Any) -> None:
    machine.since_mark()


def _duplicate(machine: _Machine, _argument: Any) -> None:
    machine.stack.append(machine.stack[-1])


def _nothing(_machine: _Machine, _argument: Any) -> None:
    """PROTO and FRAME."""


def _tuple(machine: _Machine, _argument: Any) -> None:
    machine.stack.append(tuple(machine.since_mark()))


def _list(machine: _Machine, _argument: Any) -> None:
    machine.stack.append(machine.since_mark())


def _dict(machine: _Machine, _argument: Any) -> None:
    result: dict[Any, Any] = {}
    _fill_mapping(result, machine.since_mark())
    machine.stack.append(result)


_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME"), _nothing),
    **dict.fromkeys(("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"), _push),
    **dict.fromkeys(("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"), _push),
    **dict.fromkeys(("STRING", "BINSTRING", "SHORT_BINSTRING"), _push),
    **dict.fromkeys(("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"), _push),
    "NONE": _constant(None),
    "NEWTRUE": _constant(True),
    "NEWFALSE": _constant(False),
    "MARK": _constant(_MARK),
    "EMPTY_TUPLE": _constant(()),
    "EMPTY_LIST": _fresh(list),
    "EMPTY_DICT": _fresh(dict),
    "EMPTY_SET": _fresh(list),
    "TUPLE1": _last(1),
    "TUPLE2": _last(2),
    "TUPLE3": _last(3),
    "TUPLE": _tuple,
    "LIST": _list,
    "FROZENSET": _list,
    "DICT": _dict,
    "APPEND": _append,
    "APPENDS": _appends,
    "ADDITEMS": _appends,
    "SETITEM": _set_item,
    "SETITEMS": _set_items,
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _put),
    "MEMOIZE": _memoize,
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _get),
    "GLOBAL": _global,
    "STACK_GLOBAL": _stack_global,
    "REDUCE": _reduce,
    "NEWOBJ": _new_object,
    "NEWOBJ_EX": _new_object_ex,
    "BUILD": _build,
    "BINPERSID": _persistent,
    "POP": _pop,
    "POP_MARK": _pop_mark,
    "DUP": _duplicate,
    "STOP": _stop,
}
"""What each instruction does. Those that are left out (INST, OBJ, EXT1 …) make objects by calling; none is needed."""
