"""The texts of the MixT functions: one rule for every number of windows, and no file more or less."""

from __future__ import annotations

import os

import pytest

from mixt_export.resources import resource
from tests.lower.mixt_ops import OPS, Op, text

FOLDER = resource("graphs") / "ops"


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_the_text_follows_the_rule(op: Op) -> None:
    path = FOLDER / f"{op.name}.onnxtxt"
    if os.environ.get("MIXT_UPDATE_GOLDEN"):
        path.write_text(text(op), encoding="utf-8")
    assert path.read_text(encoding="utf-8") == text(op)


def test_there_are_no_others() -> None:
    assert {path.stem for path in FOLDER.glob("MixTLinear*.onnxtxt")} == {op.name for op in OPS}
