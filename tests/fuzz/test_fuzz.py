"""A seeded sample of the mutation tests; `python -m benchmarks.fuzz` runs ten thousand."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.fuzz import mutators
from tests.fuzz.campaign import Bench, Tally, campaign, last
from tests.fuzz.guard import HangError, watched
from tests.fuzz.surfaces import SURFACES

_CASES = 15


@pytest.mark.parametrize("surface", [surface.name for surface in SURFACES])
def test_damaged_files_are_read_or_refused_with_a_documented_error(surface: str) -> None:
    tally = last(campaign(_CASES, first_seed=20_000, only=surface))
    assert tally.cases == _CASES
    assert not tally.findings, "\n".join(map(str, tally.findings))
    # Damage is damage: if most cases were read without a word, the mutations would not reach what is read.
    assert tally.outcomes["read"] < 0.9 * _CASES


def test_a_reader_that_misbehaves_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the campaign looks for, put in one by one: another exception, a loop, memory, a path outside."""
    monkeypatch.setattr("tests.fuzz.guard.SECONDS", 1.0)
    outside = tmp_path / "elsewhere.txt"
    outside.write_text("x")

    def crash(folder: Path) -> None:
        json.loads((folder / "config.json").read_text())["absent"]

    def loop(folder: Path) -> None:
        while True:
            pass

    faults = {
        "undocumented": crash,
        "hang": loop,
        "memory": lambda folder: _touch(np.zeros(30_000_000)),
        "outside": lambda folder: _touch(outside.read_text()),
    }
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    bench = Bench(scratch)
    for expected, read in faults.items():
        tally = Tally()
        bench.run(replace(SURFACES[0], read=read), 1, tally)
        assert [expected in finding.problem for finding in tally.findings] == [True], expected


def test_what_is_allocated_once_is_no_finding(tmp_path: Path) -> None:
    """An import in the middle of a case is the library's, not the reader's."""
    kept: list[object] = []

    def read(folder: Path) -> None:
        if not kept:
            kept.append(np.zeros(30_000_000))

    tally = Tally()
    Bench(tmp_path).run(replace(SURFACES[0], read=read), 1, tally)
    assert kept and not tally.findings and tally.outcomes == {"read": 1}


def _touch(value: object) -> None:
    assert value is not None


def test_a_wait_without_work_ends_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.fuzz.guard.WAITING", 0.2)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(HangError), watched(tmp_path):
        (tmp_path / "pipe").read_bytes()


def test_mutations_are_reproducible_and_do_change_something() -> None:
    data = json.dumps({"a": [1, 2, {"b": "c"}], "d": 3.5}).encode()
    for name in ("x.json", "x.safetensors", "x.bin", "x.npy", "x.pkl", "x.txt"):
        first = [mutators.damage(name, data, np.random.default_rng(seed)) for seed in range(30)]
        again = [mutators.damage(name, data, np.random.default_rng(seed)) for seed in range(30)]
        assert first == again
        assert sum(value != data for value in first) > 20
