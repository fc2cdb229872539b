"""JSON from untrusted files: bounded size, UTF-8, one object, no duplicate key, no NaN or Infinity."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mixt_export.errors import CheckpointError

#: Largest JSON file read (config.json is a few KB, the index of a 1000-shard model a few MB).
MAX_BYTES = 100_000_000
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def load_object(path: Path, *, limit: int = MAX_BYTES) -> dict[str, Any]:
    """The JSON object in the file at ``path``. Raises CheckpointError naming the file."""
    size = path.stat().st_size
    if size > limit:
        raise CheckpointError(
            f"{path}: holds {size} bytes, more than the {limit} that such a file may have; download it again."
        )
    with path.open("rb") as file:
        # As much as there is, not as much as there may be: `read` takes memory for what it is asked for.
        return parse_object(file.read(size), str(path))


def load_optional(path: Path) -> dict[str, Any]:
    """The JSON object in the file at ``path``, or {} when there is no such file. Raises CheckpointError."""
    return load_object(path) if path.is_file() else {}


def parse_object(text: bytes, what: str) -> dict[str, Any]:
    """The JSON object in ``text``; ``what`` (a file) begins the message of the CheckpointError."""
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
        if _SURROGATE.search(text):  # half a pair could be written to no file and no terminal
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except _DuplicateKeyError as error:
        raise CheckpointError(f"{what}: the JSON key {error.args[0]!r} occurs twice; write the file again.") from None
    except UnicodeEncodeError:
        raise CheckpointError(
            f"{what}: holds half a surrogate pair, which is no character; download or write the file again."
        ) from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{what}: is not UTF-8 text (byte {error.start}); download the file again.") from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise CheckpointError(f"{what}: is not valid JSON ({reason}); download or write the file again.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{what}: must be a JSON object, not {type(value).__name__}; write the file again.")
    return value


class _DuplicateKeyError(Exception):
    """A key occurs twice in one object."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise _DuplicateKeyError(key)
        result[key] = value
    return result


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
