"""The container of torch.save: an uncompressed zip, so that each storage lies in the file as it is.

``<name>/data.pkl`` is the pickle, ``<name>/data/<key>`` the bytes of each storage. The directory at the end of a zip is
a claim: every entry's own header is read and compared with it, and entries must be stored, apart and within the file.
"""

from __future__ import annotations

import struct
import zipfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import IO

from mixt_export.errors import CheckpointError, UnsupportedError

#: Largest pickle read: names, sizes and settings of a model; the weights lie beside it. Bytes.
MAX_PICKLE_BYTES = 64_000_000
_MAX_ENTRIES = 200_000
_LOCAL_HEADER = struct.Struct("<4sHHHHHIIIHH")
_ENCRYPTED = 0x1
_AGAIN = "download the file again"


@dataclass(frozen=True, slots=True)
class Entry:
    """Bytes ``offset`` to ``offset + nbytes`` of the file."""

    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Archive:
    """What torch.save wrote to ``path``: the pickle's bytes and where the storages lie, by key."""

    path: Path
    pickle: bytes
    storages: dict[str, Entry]


def read_archive(path: Path) -> Archive:
    """Read the directory and the pickle of the file at ``path``; no storage is read.

    Raises UnsupportedError for files of PyTorch before 1.6, compressed or big-endian ones, CheckpointError for
    files that are corrupt or whose entries overlap.
    """
    with path.open("rb") as file:
        entries = _entries(path, file)
        pickles = [name for name in entries if PurePosixPath(name).name == "data.pkl"]
        if len(pickles) != 1:
            raise CheckpointError(
                f"{path}: holds {len(pickles)} entries called data.pkl, one is expected of a file of torch.save; "
                f"{_AGAIN}."
            )
        root = pickles[0].removesuffix("data.pkl")
        if entries[pickles[0]].nbytes > MAX_PICKLE_BYTES:
            raise CheckpointError(
                f"{path}: its pickle takes {entries[pickles[0]].nbytes} bytes, more than the {MAX_PICKLE_BYTES} that "
                "are read; save the model's state_dict alone."
            )
        order = entries.get(f"{root}byteorder")
        if order is not None and _bytes_of(file, order, 16) != b"little":
            raise UnsupportedError(f"{path}: holds big-endian numbers; save it again on a little-endian machine.")
        pickle = _bytes_of(file, entries[pickles[0]], MAX_PICKLE_BYTES)
    prefix = f"{root}data/"
    storages = {name.removeprefix(prefix): entry for name, entry in entries.items() if name.startswith(prefix)}
    return Archive(path, pickle, storages)


def _entries(path: Path, file: IO[bytes]) -> dict[str, Entry]:
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(file) as archive:
            listed, end = archive.infolist(), archive.start_dir
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, OverflowError, struct.error):
        raise UnsupportedError(
            f"{path}: is no zip file as torch.save writes since PyTorch 1.6, and other pickles are not read; save it "
            "again with a newer PyTorch, or as safetensors."
        ) from None
    if len(listed) > _MAX_ENTRIES:
        raise CheckpointError(f"{path}: lists {len(listed)} entries, more than the {_MAX_ENTRIES} allowed; {_AGAIN}.")
    found: dict[str, Entry] = {}
    for info in listed:
        name = info.filename
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise UnsupportedError(f"{path}: its entry {name!r} is compressed, which is not read; {_SAVE_AGAIN}.")
        if info.flag_bits & _ENCRYPTED:
            raise UnsupportedError(f"{path}: its entry {name!r} is encrypted, which is not read; {_SAVE_AGAIN}.")
        if name in found:
            raise CheckpointError(f"{path}: lists the entry {name!r} twice; {_AGAIN}.")
        if not 0 <= info.header_offset < size or info.file_size > size:
            raise CheckpointError(f"{path}: its entry {name!r} is not where the directory says; {_AGAIN}.")
        found[name] = Entry(_data_offset(path, file, info), info.file_size)
    spans = sorted((entry.offset, entry.nbytes, name) for name, entry in found.items())
    for (offset, nbytes, name), (after, _, other) in pairwise(spans):
        if offset + nbytes > after:
            raise CheckpointError(f"{path}: its entries {name!r} and {other!r} overlap; the file is corrupt: {_AGAIN}.")
    if spans and spans[-1][0] + spans[-1][1] > min(end, size):
        raise CheckpointError(f"{path}: its entry {spans[-1][2]!r} reaches beyond the file's data; {_AGAIN}.")
    return found


_SAVE_AGAIN = "save it again with torch.save"


def _data_offset(path: Path, file: IO[bytes], info: zipfile.ZipInfo) -> int:
    """Where the data of an entry begin: behind its own header, which must name the same entry."""
    file.seek(info.header_offset)
    raw = file.read(_LOCAL_HEADER.size)
    fields = _LOCAL_HEADER.unpack(raw) if len(raw) == _LOCAL_HEADER.size else None
    if fields is None or fields[0] != b"PK\x03\x04" or fields[3] != zipfile.ZIP_STORED:
        raise CheckpointError(f"{path}: its entry {info.filename!r} is not where the directory says; {_AGAIN}.")
    name_length, extra_length = int(fields[9]), int(fields[10])
    if file.read(name_length).decode("utf-8", "replace") != info.orig_filename:
        raise CheckpointError(f"{path}: its entry {info.filename!r} has another name in its own header; {_AGAIN}.")
    return info.header_offset + _LOCAL_HEADER.size + name_length + extra_length


def _bytes_of(file: IO[bytes], entry: Entry, limit: int) -> bytes:
    file.seek(entry.offset)
    return file.read(min(entry.nbytes, limit))
