"""The shipped public-domain texts: what to calibrate on, what to evaluate on (provenance: docs/texts.md).

No text shares an excerpt with another. Calibration draws on two domains, so that a compression which only fits its
calibration domain shows; "novel" is in no calibration text and measures exactly that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from mixt_export.resources import texts

_FOLDER = texts()

#: Domain -> UTF-8 text to calibrate on.
CALIBRATION: Final[dict[str, Path]] = {
    "addresses": _FOLDER / "calib_addresses.txt",
    "jargon": _FOLDER / "calib_jargon.txt",
}

#: Domain -> UTF-8 text to evaluate on.
EVALUATION: Final[dict[str, Path]] = {
    "addresses": _FOLDER / "eval_addresses.txt",
    "jargon": _FOLDER / "eval_jargon.txt",
    "novel": _FOLDER / "eval_novel.txt",
}

#: Domains of EVALUATION that calibration has seen other excerpts of.
IN_DOMAIN: Final = tuple(domain for domain in EVALUATION if domain in CALIBRATION)

#: Domains of EVALUATION that calibration knows nothing of.
OUT_OF_DOMAIN: Final = tuple(domain for domain in EVALUATION if domain not in CALIBRATION)
