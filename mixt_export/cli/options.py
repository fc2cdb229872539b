"""Options that several verbs share."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import typer

from mixt_export.errors import UsageError


def from_toml(ctx: typer.Context, path: Path | None) -> Path | None:
    """Use the keys of a TOML file as defaults of this verb's options: ``max-seq-len = 2048`` for --max-seq-len.

    Raises UsageError for an unreadable file or a key that is no option of the verb.
    """
    if path is None:
        return None
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path}: not valid TOML ({error}).") from None
    known = {parameter.name for parameter in ctx.command.params} - {"config"}
    given: dict[str, Any] = {key.replace("-", "_"): value for key, value in values.items()}
    unknown = sorted(set(given) - {name for name in known if name})
    if unknown:
        raise UsageError(f"--config {path}: {unknown[0].replace('_', '-')!r} is not an option of this command.")
    ctx.default_map = {**(ctx.default_map or {}), **given}
    return path
