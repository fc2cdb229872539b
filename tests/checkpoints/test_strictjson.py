"""JSON from untrusted files: absent is empty, anything but one object is one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixt_export.checkpoints.strictjson import load_optional
from mixt_export.errors import CheckpointError


@pytest.mark.parametrize("text", ["[1]", "{", '{"a": ' * 5000])
def test_json_that_is_none(text: str, tmp_path: Path) -> None:
    path = tmp_path / "mixt_manifest.json"
    assert load_optional(path) == {}
    path.write_text(text)
    with pytest.raises(CheckpointError, match=r"mixt_manifest\.json"):
        load_optional(path)
