"""sweep.json: kept between runs, never half-written, refused when it was measured otherwise."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from mixt_export.errors import UsageError
from mixt_export.sweep.options import Variant
from mixt_export.sweep.record import FILE, Record

SETTINGS: dict[str, Any] = {"method": "svd", "seed": 0, "texts": [{"name": "a"}]}
N4, N3 = Variant("n_tensors", 4), Variant("n_tensors", 3)


def row(variant: Variant | None, blocks: int, **values: object) -> dict[str, Any]:
    return {"variant": None if variant is None else variant.to_dict(), "n_blocks": blocks, **values}


def test_rows_are_found_again(tmp_path: Path) -> None:
    record = Record.open(tmp_path / "out", SETTINGS, overwrite=False)
    assert not (tmp_path / "out").exists()
    record.add(row(N4, 2, figure=math.inf), {"transitions": []})
    record.add(row(None, 0, pair=(1, 2)), {"transitions": [float("nan")]})
    again = Record.open(tmp_path / "out", dict(SETTINGS), overwrite=False)
    assert again.has(N4, 2) and again.has(None, 0)
    assert not (again.has(N4, 1) or again.has(N3, 2) or again.has(None, 2))
    assert again.rows == [row(None, 0, pair=[1, 2]), row(N4, 2, figure=None)]
    stored = json.loads((tmp_path / "out" / FILE).read_text())
    assert (stored["format"], stored["version"], stored["transitions"]) == ("mixt-sweep", 1, [None])
    assert [path.name for path in (tmp_path / "out").iterdir()] == [FILE]


def test_curves(tmp_path: Path) -> None:
    record = Record(tmp_path, SETTINGS, [])
    for variant, blocks in ((N3, 8), (N4, 8), (None, 0), (N4, 10), (N4, 2)):
        record.add(row(variant, blocks), {})
    assert [one["n_blocks"] for one in record.curve(N4)] == [0, 2, 8, 10]
    assert record.variants() == [N3, N4]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = Record(tmp_path, SETTINGS, [])
    record.add(row(None, 0), {})
    before = (tmp_path / FILE).read_bytes()

    def interrupted(_self: Path, _target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        record.add(row(N4, 1), {})
    assert (tmp_path / FILE).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_other_settings_are_named(tmp_path: Path) -> None:
    Record(tmp_path, SETTINGS, []).add(row(None, 0), {})
    with pytest.raises(UsageError, match=r"another seed \(0, now 3\).*--overwrite"):
        Record.open(tmp_path, {**SETTINGS, "seed": 3}, overwrite=False)
    with pytest.raises(UsageError, match="another refine steps"):
        Record.open(tmp_path, {**SETTINGS, "refine_steps": 2}, overwrite=False)
    assert Record.open(tmp_path, {**SETTINGS, "seed": 3}, overwrite=True).rows == []


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"format": "mixt-sweep", "version": 2, "rows": [], "settings": {}}',
        '{"format": "mixt-sweep", "version": 1, "rows": 3, "settings": {}}',
        '{"format": "mixt-sweep", "version": 1, "rows": [{"n_blocks": 1}], "settings": {}}',
        '{"format": "mixt-sweep", "version": 1, "rows": [{"variant": 4, "n_blocks": 1}], "settings": {}}',
        '{"format": "mixt-sweep", "version": 1, "rows": [], "settings": []}',
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE).write_text(content)
    with pytest.raises(UsageError, match=r"sweep\.json: is not a .*sweep"):
        Record.open(tmp_path, SETTINGS, overwrite=False)


def test_folders_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("dear")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="holds files but no"):
            Record.open(tmp_path, SETTINGS, overwrite=overwrite)
    with pytest.raises(UsageError, match="not a folder"):
        Record.open(tmp_path / "thesis.txt", SETTINGS, overwrite=False)
