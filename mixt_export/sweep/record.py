"""sweep.json: rows that survive an interrupt and are found again."""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

from mixt_export.checkpoints.strictjson import load_object
from mixt_export.errors import CheckpointError, UsageError
from mixt_export.sweep.options import Variant, variant_of

FILE = "sweep.json"
FORMAT, VERSION = "mixt-sweep", 1

Row = dict[str, Any]


class Record:
    """The rows of one sweep in ``folder``, written whole after each."""

    def __init__(self, folder: Path, settings: dict[str, Any], rows: list[Row]) -> None:
        self.folder, self.settings, self.rows = folder, settings, rows

    @classmethod
    def open(cls, folder: Path, settings: dict[str, Any], *, overwrite: bool) -> Record:
        """The record in ``folder`` if it was measured with equal ``settings``, else an empty one; writes nothing.

        Raises UsageError when ``folder`` holds other things than a sweep, a damaged one, or, without ``overwrite``,
        rows measured with other settings (the first difference is named).
        """
        check_folder(folder)
        settings = _json(settings)
        path = folder / FILE
        if overwrite or not path.is_file():
            return cls(folder, settings, [])
        try:
            stored = load_object(path)
            known = (stored["format"], stored["version"]) == (FORMAT, VERSION)
            rows, had = stored["rows"], {**stored["settings"]}
            keys = {_key(row) for row in rows} if known else set()
        except (CheckpointError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise damaged(path) from error
        if not known or len(keys) != len(rows):
            raise UsageError(
                f"{path}: is not a sweep of this version; choose another folder with -o or pass --overwrite."
            )
        for name in sorted({*settings, *had}):
            if settings.get(name) != had.get(name):
                raise UsageError(
                    f"{path}: its rows were measured with another {name.replace('_', ' ')} "
                    f"({_short(had.get(name))}, now {_short(settings.get(name))}); choose another folder with -o or "
                    "pass --overwrite."
                )
        return cls(folder, settings, rows)

    def has(self, variant: Variant | None, blocks: int) -> bool:
        """Whether the row is there; ``variant`` None: the dense model."""
        return any(_key(row) == _named(variant, blocks) for row in self.rows)

    def add(self, row: Row, derived: dict[str, Any]) -> None:
        """Put in ``row`` and write the file with ``derived`` figures of all rows beside it."""
        self.rows.append(_json(row))
        self.rows.sort(key=_key)
        self.write(derived)

    def write(self, derived: dict[str, Any]) -> None:
        """Write the file anew; the old one stays as it is until the new one is whole."""
        text = json.dumps(self.to_dict(derived), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        self.folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{FILE}.", dir=self.folder)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            Path(name).chmod(0o644)
            Path(name).replace(self.folder / FILE)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    def to_dict(self, derived: dict[str, Any]) -> dict[str, Any]:
        """The whole file as data."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "settings": self.settings,
            "rows": self.rows,
            **_json(derived),
        }

    def curve(self, variant: Variant) -> list[Row]:
        """The dense row and those of ``variant``, by number of blocks."""
        wanted = (_named(None, 0)[:2], _named(variant, 0)[:2])
        return sorted((row for row in self.rows if _key(row)[:2] in wanted), key=lambda row: int(row["n_blocks"]))

    def variants(self) -> list[Variant]:
        """Every variant that has a row."""
        found = {_key(row): variant_of(row["variant"]) for row in self.rows if row["variant"] is not None}
        return list(dict.fromkeys(found[key] for key in sorted(found)))


def damaged(path: Path) -> UsageError:
    """What to say of a sweep.json that is not as this package writes it."""
    return UsageError(f"{path}: is not a readable sweep; choose another folder with -o or pass --overwrite.")


def check_folder(folder: Path) -> None:
    """Raise UsageError unless ``folder`` is missing, empty or that of a sweep."""
    if not folder.exists() and not folder.is_symlink():
        return
    if not folder.is_dir():
        raise UsageError(f"{folder}: exists and is not a folder; choose another output with -o.")
    if any(folder.iterdir()) and not (folder / FILE).is_file():
        raise UsageError(f"{folder}: holds files but no {FILE}; choose another output with -o.")


def _key(row: Row) -> tuple[str, float, int]:
    return _named(None if row["variant"] is None else variant_of(row["variant"]), int(row["n_blocks"]))


def _named(variant: Variant | None, blocks: int) -> tuple[str, float, int]:
    return ("", 0.0, blocks) if variant is None else (variant.argument, float(variant.value), blocks)


def _json(value: Any) -> Any:
    """Plain JSON types: tuples as lists, NaN and infinities as null."""
    if isinstance(value, dict):
        return {str(key): _json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"
