"""Ways to damage a file on purpose: bytes, JSON with its structure known, safetensors headers, zips, paths."""

from __future__ import annotations

import io
import json
import os
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Rng = np.random.Generator

#: Numbers that readers multiply, allocate or index with.
NUMBERS: tuple[Any, ...] = (
    *(
        0,
        -1,
        1,
        2,
        3,
        7,
        16,
        255,
        2**31 - 1,
        2**31,
        2**32,
        2**48,
        2**62,
        2**63 - 1,
        2**63,
        2**64,
        -(2**63),
        10**30,
        10**400,
    ),
    *(0.0, -0.0, 0.5, 1e-320, 1e308, -1.5, 1e400),
    *(True, False, None, "", "0", "576", [], {}, [0], [2**62, 2**62], [-1, 5], [[1]], [1.5], ["x"]),
)
#: Names that must not lead anywhere. {outside} is a real folder beside the model's, with real files in it.
PATHS = (
    *("../secret/model.safetensors", "{outside}/model.safetensors", "..", ".", "/", "", "/etc/passwd"),
    *("a/../../secret", "..\\secret", "model.safetensors\0.txt", "\0", "CON", ".hidden.safetensors", "x" * 5000),
    *("model.safetensors/", "~/x", "file:///etc/passwd", "https://example.org/model.safetensors"),
    *("\ud800", "\u202egnp.safetensors", "model\n.safetensors"),
)
_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "F8_E4M3", "C64", "I4", "f32", "")
_RAW = (
    *(b"NaN", b"Infinity", b"-Infinity", b"1e999", b"01", b"1e"),
    *(b'"\\ud800"', b'"\\x"', b"tru", b"\xff", b"\x00", b"'a'"),
)


def flip_bits(data: bytes, rng: Rng) -> bytes:
    """One to eight bits of ``data`` inverted, more often near its beginning, where the lengths are."""
    if not data:
        return data
    values = bytearray(data)
    for _ in range(int(rng.integers(1, 9))):
        limit = min(len(values), 64) if rng.random() < 0.5 else len(values)
        values[int(rng.integers(limit))] ^= 1 << int(rng.integers(8))
    return bytes(values)


def truncate(data: bytes, rng: Rng) -> bytes:
    return data[: int(rng.integers(len(data) + 1))]


def extend(data: bytes, rng: Rng) -> bytes:
    return data + rng.bytes(int(rng.integers(1, 64)))


def splice(data: bytes, rng: Rng) -> bytes:
    """A piece of ``data`` copied over another place of it."""
    if len(data) < 4:
        return rng.bytes(8)
    start, target = (int(rng.integers(len(data))) for _ in range(2))
    piece = data[start : start + int(rng.integers(1, 32))]
    return data[:target] + piece + data[target + len(piece) :]


def replace_all(data: bytes, rng: Rng) -> bytes:
    """Something else entirely."""
    return (b"", b"\x00" * 16, b"{}", b"[]", b"null", b'"x"', b"PK\x03\x04", b"\x80\x04.", rng.bytes(100))[
        int(rng.integers(9))
    ]


def length_field(data: bytes, rng: Rng) -> bytes:
    """Eight bytes that a reader may take for a length, at the beginning or at any aligned place."""
    value = int(rng.choice([0, 1, 7, len(data), len(data) * 2, 2**31, 2**40, 2**62]))
    place = 0 if rng.random() < 0.7 or len(data) < 24 else int(rng.integers(len(data) // 8 - 1)) * 8
    return data[:place] + struct.pack("<Q", value) + data[place + 8 :]


BYTES: tuple[Callable[[bytes, Rng], bytes], ...] = (flip_bits, truncate, extend, splice, replace_all, length_field)


def damage_json(data: bytes, rng: Rng) -> bytes:
    """One to three changes of a JSON text that keep it JSON, or one that does not."""
    try:
        value = json.loads(data)
    except ValueError:
        return flip_bits(data, rng)
    if rng.random() < 0.12:
        return _broken_text(data, rng)
    for _ in range(int(rng.integers(1, 4))):
        value = _change(value, rng)
    return json.dumps(value).encode("utf-8", errors="surrogatepass")


def _broken_text(data: bytes, rng: Rng) -> bytes:
    way = int(rng.integers(5))
    if way == 0:  # a value that JSON does not have, in the place of one it has
        places = [index for index, byte in enumerate(data) if byte in b"0123456789"]
        if places:
            at = places[int(rng.integers(len(places)))]
            return data[:at] + _RAW[int(rng.integers(len(_RAW)))] + data[at + 1 :]
    if way == 1:
        depth = int(rng.choice([50, 900, 5_000, 200_000]))
        return b'{"a":' * depth + b"1" + b"}" * depth if rng.random() < 0.5 else b"[" * depth + b"]" * depth
    if way == 2:  # the same key twice
        end = data.rstrip().rfind(b"}")
        start = data.find(b'"')
        key = data[start : data.find(b'"', start + 1) + 1]
        return data[:end] + b", " + key + b": 1" + data[end:] if start >= 0 <= end else data
    if way == 3:
        return data.decode("utf-8", errors="replace").encode(str(rng.choice(["utf-16", "utf-8-sig", "utf-32"])))
    return b"[" + b"9" * int(rng.choice([400, 5_000, 20_000])) + b"]"


def _nodes(value: Any, found: list[tuple[Any, Any]]) -> None:
    """(container, key or index) of everything inside ``value``."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        found.append((value, key))
        _nodes(value[key], found)


def _change(value: Any, rng: Rng) -> Any:
    found: list[tuple[Any, Any]] = []
    _nodes(value, found)
    if not found:
        return NUMBERS[int(rng.integers(len(NUMBERS)))]
    container, key = found[int(rng.integers(len(found)))]
    changes: tuple[Callable[[], Any], ...] = (
        lambda: container.__setitem__(key, NUMBERS[int(rng.integers(len(NUMBERS)))]),
        lambda: container.__setitem__(key, PATHS[int(rng.integers(len(PATHS)))]),
        lambda: container.__delitem__(key),
        lambda: _swap(container, key, found, rng),
        lambda: _rename(container, key, rng),
        lambda: container.__setitem__(key, _scaled(container[key], rng)),
        lambda: container.__setitem__(key, [container[key]] * int(rng.choice([0, 1, 2, 70, 3000]))),
        lambda: container.__setitem__(key, _DTYPES[int(rng.integers(len(_DTYPES)))]),
    )
    changes[int(rng.integers(len(changes)))]()
    return value


def _swap(container: Any, key: Any, found: list[tuple[Any, Any]], rng: Rng) -> None:
    other, place = found[int(rng.integers(len(found)))]
    copied = json.loads(json.dumps(other[place]))
    container[key] = copied


def _rename(container: Any, key: Any, rng: Rng) -> None:
    if isinstance(container, dict):
        names = (key + "x", key.upper(), "", "__metadata__", "weight", PATHS[int(rng.integers(len(PATHS)))])
        container[names[int(rng.integers(len(names)))]] = container.pop(key)


def _scaled(value: Any, rng: Rng) -> Any:
    """A number near to ``value``, or far from it: what off-by-one and overflow are made of."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    return (value + 1, value - 1, -value, value * 2, value * 10**9, value // 2)[int(rng.integers(6))]


def damage_safetensors(data: bytes, rng: Rng) -> bytes:
    """The header's fields changed, its length right or wrong, the data as they were."""
    length = int.from_bytes(data[:8], "little")
    if length > len(data) - 8:
        return flip_bits(data, rng)
    header = damage_json(data[8 : 8 + length], rng)
    claimed = (
        len(header) if rng.random() < 0.9 else int(rng.choice([0, 1, len(header) - 1, len(header) + 8, 2**33, 2**63]))
    )
    return struct.pack("<Q", claimed) + header + data[8 + length :]


def damage_zip(data: bytes, rng: Rng) -> bytes:
    """A member's bytes, name or place changed; what torch.save writes is a zip of a pickle and raw storages."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as source:
            members = [(info.filename, source.read(info)) for info in source.infolist()]
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, EOFError):
        return flip_bits(data, rng)
    chosen = int(rng.integers(len(members)))
    name, content = members[chosen]
    way = int(rng.integers(6))
    if way == 0:
        members[chosen] = name, BYTES[int(rng.integers(len(BYTES)))](content, rng)
    elif way == 1:
        members[chosen] = str(rng.choice(["../../secret/x", "/etc/passwd", name + "x", name.upper()])), content
    elif way == 2:
        del members[chosen]
    elif way == 3:
        members.append((name, rng.bytes(40)))
    elif way == 4:
        pickles = [index for index, member in enumerate(members) if member[0].endswith(".pkl")]
        at = pickles[0] if pickles else chosen
        members[at] = members[at][0], damage_pickle(members[at][1], rng)
    target = io.BytesIO()
    packing = zipfile.ZIP_DEFLATED if way == 5 or rng.random() < 0.1 else zipfile.ZIP_STORED
    with warnings.catch_warnings(), zipfile.ZipFile(target, "w", packing) as out:
        warnings.simplefilter("ignore")  # a name that is there already: on purpose
        for name, content in members:
            out.writestr(name, content)
    return target.getvalue()


#: Whole programs for the pickle machine: names that run code, sizes that ask for memory, loops in the data.
_PICKLES = (
    b"cos\nsystem\n(S'true'\ntR.",
    b"\x80\x02c__builtin__\neval\nX\x01\x00\x00\x001\x85R.",
    b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.",
    b"\x80\x02]q\x00h\x00a.",
    b"\x80\x02X\xff\xff\xff\x7fabc.",
    b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fabc.",
    b"\x80\x02" + b"(" * 5000 + b".",
    b"\x80\x02" + b"]" * 3000 + b"a" * 2999 + b".",
    b"\x80\x02r\xff\xff\xff\x7f.",
    b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
    b"\x80\x02ccollections\nOrderedDict\n)R}b.",
)


def damage_pickle(data: bytes, rng: Rng) -> bytes:
    """Opcodes and their arguments changed, or another program altogether."""
    if rng.random() < 0.25:
        return _PICKLES[int(rng.integers(len(_PICKLES)))]
    if rng.random() < 0.4 and len(data) > 12:  # four-byte numbers: lengths, counts, sizes of storages
        at = int(rng.integers(len(data) - 4))
        value = int(rng.choice([0, 1, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF]))
        return data[:at] + struct.pack("<I", value) + data[at + 4 :]
    return BYTES[int(rng.integers(len(BYTES)))](data, rng)


def damage_npy(data: bytes, rng: Rng) -> bytes:
    """The dictionary in the header of an .npy file changed, or its bytes."""
    shapes = ("(1, 4611686018427387904)", "(-1, 3)", "()", "(9" + "0" * 30 + ",)", "(2,)", "'x'", "None", "(1.5,)")
    descriptions = ("'|O'", "'<f8'", "'<f4'", "'|V100000000'", "'<U1000000000'", "[('a', '<f4')]", "''", "'>f4'")
    if rng.random() < 0.3 or not data.startswith(b"\x93NUMPY") or len(data) < 12:
        return BYTES[int(rng.integers(len(BYTES)))](data, rng)
    length = int.from_bytes(data[8:10], "little")
    shape, kind = (str(rng.choice(values)) for values in (shapes, descriptions))
    text = f"{{'descr': {kind}, 'fortran_order': {bool(rng.integers(2))}, 'shape': {shape}, }}".encode()
    header = text + b" " * max(0, length - len(text) - 1) + b"\n"
    return data[:8] + struct.pack("<H", len(header)) + header + data[10 + length :]


def damage_path(path: Path, outside: Path, rng: Rng) -> None:
    """Put something else in the place of the file ``path``: a link, a folder, a pipe, nothing."""
    path.unlink()
    way = int(rng.integers(7))
    if way == 0:
        path.symlink_to(outside / "model.safetensors")
    elif way == 1:
        path.symlink_to("/etc/passwd")
    elif way == 2:
        path.symlink_to(path.name)
    elif way == 3:
        path.symlink_to(os.path.relpath(outside / "config.json", path.parent))
    elif way == 4:
        path.mkdir()
    elif way == 5:
        os.mkfifo(path)


#: Suffix -> what knows the structure of such a file.
BY_SUFFIX: dict[str, Callable[[bytes, Rng], bytes]] = {
    ".json": damage_json,
    ".safetensors": damage_safetensors,
    ".bin": damage_zip,
    ".pt": damage_zip,
    ".pth": damage_zip,
    ".pkl": damage_pickle,
    ".npy": damage_npy,
}


def damage(name: str, data: bytes, rng: Rng) -> bytes:
    """The content of the file ``name`` after one mutation; three of four know the structure of the file."""
    informed = BY_SUFFIX.get(Path(name).suffix)
    if informed is not None and rng.random() < 0.75:
        return informed(data, rng)
    return BYTES[int(rng.integers(len(BYTES)))](data, rng)
