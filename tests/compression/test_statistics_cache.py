"""The statistics cache: equal bytes with and without, what makes an entry another, damage, eviction, locks."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixt_export.checkpoints import open_checkpoint
from mixt_export.compression import CompressionReport, Settings, compress
from mixt_export.compression.statistics_cache import (
    StatisticsCache,
    array_digest,
    cache_of,
    model_digest,
    pack_symmetric,
    unpack_symmetric,
)
from tests.tiny import write_tiny

SETTINGS = Settings(windows=5, window=32, fisher_windows=3, batch=2)


def made(model: Path, text: Path, name: str, cache: bool | Path, **options: Any) -> tuple[bytes, CompressionReport]:
    """The bytes of everything that is written but the report of times, in one piece."""
    output = model.parent / name
    given: dict[str, Any] = {"calib": [text], "settings": SETTINGS, "evaluate": False, **options}
    report = compress(model, output, cache=cache, overwrite=True, **given)
    files = sorted(path for path in output.iterdir() if path.name != "compress_report.json")
    return b"".join(path.name.encode() + path.read_bytes() for path in files), report


@pytest.mark.parametrize(
    ("method", "ranks", "kinds"),
    [
        ("gfw-svd", "water-filling", ["inputs", "fisher"]),
        ("svd-llm", "water-filling", ["inputs", "traces"]),
        ("svd-llm", "svd-llm-v2", ["inputs"]),
        ("asvd", "relative", ["inputs"]),
    ],
)
def test_equal_bytes_with_and_without(
    tmp_path: Path, model: Path, text: Path, method: str, ranks: str, kinds: list[str]
) -> None:
    """Without a cache, filling it, from it, and with one of two entries missing."""
    cache = tmp_path / "cache"
    options = {"method": method, "ranks": ranks, "keep": 0.6}
    without, _ = made(model, text, "without", False, **options)
    first, report = made(model, text, "first", cache, **options)
    assert report.cached == ()
    assert sorted(path.name.partition("-")[0] for path in cache.iterdir()) == sorted(kinds)
    second, report = made(model, text, "second", cache, **options)
    assert list(report.cached) == kinds
    assert without == first == second
    for kind in kinds:
        for folder in cache.glob(f"{kind}-*"):
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
        again, report = made(model, text, "again", cache, **options)
        assert kind not in report.cached
        assert again == without


def test_another_ratio_or_method_uses_the_same_entries(tmp_path: Path, model: Path, text: Path) -> None:
    cache = tmp_path / "cache"
    made(model, text, "a", cache, keep=0.6)
    _, report = made(model, text, "b", cache, keep=0.8, ranks="uniform")
    assert report.cached == ("inputs", "fisher")
    _, report = made(model, text, "c", cache, method="svd-llm")
    assert report.cached == ("inputs",)


def test_what_the_statistics_depend_on_makes_another_entry(tmp_path: Path, model: Path, text: Path) -> None:
    cache = tmp_path / "cache"
    other_text = tmp_path / "other.txt"
    other_text.write_text(text.read_text(encoding="utf-8")[::-1], encoding="utf-8")
    other_model = write_tiny(tmp_path / "other", "qwen2", seed=9)
    made(model, text, "a", cache)
    changed: dict[str, dict[str, Any]] = {
        "text": {"calib": [other_text]},
        "windows": {"settings": Settings(windows=4, window=32, fisher_windows=2, batch=2)},
        "batch": {"settings": Settings(windows=5, window=32, fisher_windows=3, batch=3)},
        "targets": {"exclude": ["q_proj"]},
    }
    for name, options in changed.items():
        _, report = made(model, text, name, cache, **options)
        assert report.cached == (), name
    _, report = made(other_model, text, "another", cache)
    assert report.cached == ()
    assert model_digest(open_checkpoint(model)) != model_digest(open_checkpoint(other_model))
    sharded = write_tiny(tmp_path / "sharded", "qwen2", shards=2)
    assert model_digest(open_checkpoint(sharded)) == model_digest(open_checkpoint(model))


@pytest.mark.parametrize("damage", ["flip", "truncate", "index", "lost"])
def test_a_damaged_entry_is_measured_again(tmp_path: Path, model: Path, text: Path, damage: str) -> None:
    cache = tmp_path / "cache"
    before, _ = made(model, text, "a", cache)
    for folder in cache.iterdir():
        array = max(folder.glob("*.bin"), key=lambda path: path.stat().st_size)
        data = bytearray(array.read_bytes())
        if damage == "flip":
            data[len(data) // 2] ^= 1
            array.write_bytes(data)
        elif damage == "truncate":
            array.write_bytes(data[:-8])
        elif damage == "lost":
            array.unlink()
        else:
            (folder / "index.json").write_text(json.dumps({"arrays": {"x": 3}}))
    after, report = made(model, text, "b", cache)
    assert report.cached == ()
    assert after == before
    _, report = made(model, text, "c", cache)
    assert report.cached == ("inputs", "fisher"), "the damaged entries were not replaced"


def test_nothing_is_left_by_a_run_that_broke(tmp_path: Path) -> None:
    cache = StatisticsCache(tmp_path / "cache")
    with pytest.raises(RuntimeError, match="midway"), cache.entry("a", {}, 100, tmp_path) as entry:
        entry.put("x", np.ones(3))
        raise RuntimeError("midway")
    assert list((tmp_path / "cache").iterdir()) == []
    killed = tmp_path / "cache" / ".new-dead"  # what a killed process leaves
    killed.mkdir()
    (killed / "0000.bin").write_bytes(b"half")
    os.utime(killed, (0, 0))
    put(cache, "a", tmp_path)
    assert not killed.exists()


def put(cache: StatisticsCache, kind: str, scratch: Path, size: int = 1000) -> None:
    with cache.entry(kind, {}, size, scratch) as entry:
        assert not entry.complete
        entry.put("x", np.zeros(size, np.uint8))
        entry.commit()


def kinds(folder: Path) -> list[str]:
    return sorted(path.name.partition("-")[0] for path in folder.iterdir())


def test_the_least_recently_used_give_way(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    cache = StatisticsCache(folder, limit=4000)
    for age, kind in enumerate(("a", "b", "c")):
        put(cache, kind, tmp_path)
        index = next(folder.glob(f"{kind}-*")) / "index.json"
        os.utime(index, (1000 + age, 1000 + age))
    with cache.entry("a", {}, 1000, tmp_path) as entry:  # used again: now the youngest
        assert entry.complete
    put(cache, "d", tmp_path)
    assert kinds(folder) == ["a", "c", "d"]
    with cache.entry("c", {}, 1000, tmp_path) as entry:
        assert entry.complete
        index = next(folder.glob("c-*")) / "index.json"
        os.utime(index, (1, 1))
        put(cache, "e", tmp_path)
        assert "c" in kinds(folder), "an entry that is being read was removed"
        assert entry.get("x").shape == (1000,)
    put(cache, "huge", tmp_path, 5000)
    assert "huge" not in kinds(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, model: Path, text: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    without, _ = made(model, text, "a", False)
    found, report = made(model, text, "b", blocked)
    assert (found, report.cached) == (without, ())


def test_the_environment_moves_it_or_turns_it_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXT_STATISTICS", str(tmp_path))
    assert cache_of(True) == tmp_path
    assert cache_of(False) is None
    monkeypatch.setenv("MIXT_STATISTICS", "off")
    assert cache_of(True) is None
    assert cache_of(tmp_path / "x") == tmp_path / "x"
    monkeypatch.delenv("MIXT_STATISTICS")
    monkeypatch.setenv("MIXT_CACHE", str(tmp_path / "user"))
    assert cache_of(True) == tmp_path / "user" / "statistics"


def test_packed_symmetric_matrices_come_back() -> None:
    rng = np.random.default_rng(0)
    for size in (1, 2, 7, 130):
        matrix = rng.normal(size=(size, size)).astype(np.float32)
        matrix += matrix.T
        packed = pack_symmetric(matrix)
        assert packed.shape == (size * (size + 1) // 2,)
        np.testing.assert_array_equal(unpack_symmetric(packed), matrix)
    assert array_digest(np.zeros(4)) != array_digest(np.zeros((2, 2)))
    assert array_digest(np.zeros(4)) != array_digest(np.zeros(8, np.float32))
