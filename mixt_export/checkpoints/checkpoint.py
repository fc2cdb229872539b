"""A model folder, opened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixt_export.checkpoints import paths
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


@dataclass(frozen=True)
class Checkpoint:
    """A model folder whose headers were read and checked; no weight has been touched.

    ``format`` is the name of the format and ``reason`` why it was recognised. ``config`` is config.json,
    ``factors`` maps a linear's name to its FactorizedLinear (empty for a dense folder), ``info`` is what compress
    recorded.
    """

    path: Path
    format: str
    reason: str
    config: Mapping[str, Any]
    store: TensorStore
    factors: Mapping[str, FactorizedLinear] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)

    def companions(self) -> tuple[Path, ...]:
        """Files to copy byte for byte beside a converted model; config.json is not among them.

        Raises CheckpointError when one of them is a link that leads out of the folder.
        """
        entries = sorted(entry.name for entry in self.path.iterdir() if not entry.is_dir())
        licences = (name for name in entries if name.upper().startswith(LICENCES))
        found = (paths.own_file(self.path, name) for name in (*COMPANIONS, *licences))
        return tuple(path for path in found if path is not None)
