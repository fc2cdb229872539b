"""Find the data that travels with the package: graphs/, runtimes/ and texts."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def resource(kind: str) -> Path:
    """Folder of ``kind`` ("graphs" or "runtimes"), in an installed wheel or in a source checkout."""
    packaged = _PACKAGE / "_resources" / kind
    return packaged if packaged.is_dir() else _PACKAGE.parent / kind


def texts() -> Path:
    """Folder of the shipped public-domain calibration and evaluation texts."""
    return _PACKAGE / "texts"
