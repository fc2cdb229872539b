"""The option --base of verbs that open model folders."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

BaseOption = Annotated[
    Path | None,
    typer.Option(
        "--base",
        metavar="DIR",
        help="Base model of an adapter or of AA-SVD's factors; also as MIXT_BASE_MODEL.",
        show_default=False,
    ),
]


def use_base(base: Path | None) -> None:
    """Make ``base`` the base model of what this process and those it starts open; None leaves the environment's."""
    if base is not None:
        os.environ["MIXT_BASE_MODEL"] = str(base.absolute())
