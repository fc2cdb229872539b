"""Safetensors bytes written by hand, so that tests of the reader and the writer share no code with them."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

CONFIG = {"model_type": "llama", "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 4}


def tensor(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def file_bytes(header: object, data: bytes, *, length: int | None = None) -> bytes:
    """A safetensors file; ``header`` is an object for JSON or ready bytes, ``length`` a false length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def write_folder(folder: Path, content: bytes | None, config: object = CONFIG, name: str = "model.safetensors") -> Path:
    """A model folder of config.json and one weight file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if content is not None:
        (folder / name).write_bytes(content)
    return folder


def parse(content: bytes) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Header and bytes of each tensor of a safetensors file."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    data = content[8 + length :]
    pieces = {name: data[slice(*field["data_offsets"])] for name, field in header.items() if name != "__metadata__"}
    return header, pieces
