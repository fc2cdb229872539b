"""Open a tokenizer.json: one way, one error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mixt_export.errors import CheckpointError


def load_tokenizer(path: Path) -> Any:
    """The `tokenizers.Tokenizer` stored at ``path``. Raises CheckpointError when it cannot be read as one."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(
            f"{path}: is not a readable tokenizer ({error}); copy it from the model again."
        ) from error
