"""The commands in this process, as the shell would call them."""

from __future__ import annotations

import sys

from mixt_export.cli.guard import guarded
from mixt_export.cli.main import load_verb


def run_verb(verb: str, *arguments: object) -> int:
    """Exit code of ``mixt VERB ARGUMENTS``."""
    original, sys.argv = sys.argv, [f"mixt {verb}", *map(str, arguments)]
    try:
        return guarded(load_verb(verb), f"mixt {verb}")
    finally:
        sys.argv = original
