"""What to count: a preset of public architecture numbers, a config.json, or a model folder's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixt_export.checkpoints import strictjson
from mixt_export.errors import MixtError, UsageError
from mixt_export.families import Decoder, decoder_of

_PRESETS = Path(__file__).parent / "presets"
_CONFIG_BYTES = 10_000_000


@dataclass(frozen=True)
class Source:
    """A model known by its architecture alone. ``kind``: ``preset`` or ``config``; ``name``: as the user gave it."""

    name: str
    kind: str
    config: Mapping[str, Any]
    decoder: Decoder


def presets() -> list[str]:
    """Names of the presets, each a config.json that ships with the package."""
    return sorted(file.name.removesuffix(".json") for file in _PRESETS.glob("*.json"))


def open_source(text: str) -> Source:
    """The preset ``text`` (in any case), else the config.json at that path or in that folder.

    Raises UsageError when it is neither, listing the presets, CheckpointError for a file that is no config.json or
    lacks a key, UnsupportedError for a family this version does not know.
    """
    if text.lower() in presets():
        return _source(text.lower(), "preset", _PRESETS / f"{text.lower()}.json")
    path = Path(text)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise UsageError(
            f"--as {text}: is no preset and no config.json; presets are {', '.join(presets())}, anything else is the "
            "path of a config.json or of a model folder."
        )
    return _source(text, "config", path)


def _source(name: str, kind: str, path: Path) -> Source:
    config = strictjson.load_object(path, limit=_CONFIG_BYTES)
    try:
        decoder = decoder_of(config)
    except MixtError as error:
        raise type(error)(str(error).replace("config.json", str(path), 1)) from error
    return Source(name, kind, config, decoder)
