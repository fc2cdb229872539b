"""A model folder, opened."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixt_export.checkpoints import paths, strictjson
from mixt_export.checkpoints.store import TensorStore
from mixt_export.network import FactorizedLinear

#: Files that travel with a model byte for byte: what turns text into tokens and back, and what the licence asks for.
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
)

#: Beginnings of the names of licence files, in capitals.
LICENCES = ("LICENSE", "LICENCE", "COPYING", "NOTICE", "USE_POLICY", "USE-POLICY")


CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class Checkpoint:
    """A model folder whose headers were read and checked; no weight has been touched.

    ``format`` is the name of the format and ``reason`` why it was recognised. ``config`` is config.json, in a foreign
    format with the family's own model_type and without the format's keys. ``factors`` maps a linear's name to its
    FactorizedLinear (empty for a dense folder), ``info`` is what compress recorded. ``bases`` are the folders that a
    model which is stored as a difference (an adapter) builds on, nearest first: what ``path`` lacks is theirs.
    """

    path: Path
    format: str
    reason: str
    config: Mapping[str, Any]
    store: TensorStore
    factors: Mapping[str, FactorizedLinear] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)
    bases: tuple[Path, ...] = ()

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folder and those it builds on."""
        return (self.path, *self.bases)

    def companions(self) -> tuple[Path, ...]:
        """Files to copy byte for byte beside a converted model; config.json is not among them.

        Raises CheckpointError when one of them is a link that leads out of the folder.
        """
        found: dict[str, Path] = {}
        for folder in self.folders:
            entries = sorted(entry.name for entry in folder.iterdir() if not entry.is_dir())
            licences = (name for name in entries if name.upper().startswith(LICENCES))
            for path in (paths.own_file(folder, name) for name in (*COMPANIONS, *licences)):
                if path is not None:
                    found.setdefault(path.name, path)
        return tuple(found.values())

    def companion(self, name: str) -> Path | None:
        """The file ``name`` of the first of the folders that has one. Raises CheckpointError as ``companions``."""
        return next((path for folder in self.folders if (path := paths.own_file(folder, name)) is not None), None)

    def config_bytes(self) -> bytes:
        """What config.json beside a converted model holds: the file's bytes, or ``config`` where a reader changed it.

        Raises CheckpointError when the file is no longer what was opened.
        """
        path = self.companion(CONFIG_FILE)
        if path is not None and strictjson.load_object(path) == dict(self.config):
            return path.read_bytes()
        return (json.dumps(dict(self.config), indent=2, ensure_ascii=False) + "\n").encode()
