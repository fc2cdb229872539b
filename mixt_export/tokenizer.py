"""Open a tokenizer.json: one way, one error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mixt_export.errors import CheckpointError


def load_tokenizer(path: Path) -> Any:
    """The `tokenizers.Tokenizer` stored at ``path``, without the truncation and padding that the file may ask for.

    Encoders' files do, for training; transformers ignores both too. Raises CheckpointError when it cannot be read.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(
            f"{path}: is not a readable tokenizer ({error}); copy it from the model again."
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
